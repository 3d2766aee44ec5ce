"""Generation into a cache of fixed size gives the tokens of `generate`, however the steps are taken."""

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MistralConfig

from prunelib.models import UnsupportedModel, remove_layers
from prunelib.slicing.rotate import slice_model
from prunelib.slicing.schedules import constant
from prunelib.speed.decoding import STATIC_ATTENTION, CacheShape, Decoder, reads_filled_part
from prunelib.speed.timing import random_sliced

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def decided(model):
    """The model with weights large enough that its choices are no near ties, and no token that ends a text."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def llama(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    return decided(LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes | {"num_key_value_heads": 2} | changes)))


def neox():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    return decided(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, **sizes)))


def reference(model, prompts, count):
    """Tokens of transformers' own greedy generation."""
    found = model.generate(prompts, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return found[:, prompts.shape[1] :]


def prompts_for(model, rows=3, length=5):
    return torch.randint(3, 97, (rows, length)).to(model.device)


@pytest.mark.parametrize("static", [False, True], ids=["plain", "static"])
@pytest.mark.parametrize("family", [llama, neox])
def test_tokens_are_those_of_generate(family, static):
    model = family()
    for pruned in (model, remove_layers(model, [1])):
        prompts = prompts_for(model)
        assert torch.equal(Decoder(pruned, 3, 40, static=static).generate(prompts, 20), reference(pruned, prompts, 20))
    assert model.config._attn_implementation != STATIC_ATTENTION, "a decoder leaves the model as it was"


def test_tokens_of_a_sliced_model():
    model = llama()
    windows = torch.randint(0, 97, (8, 16))
    narrow = slice_model(model, constant(4, 64, 0.25), windows, progress=False)
    prompts = prompts_for(model)
    for static in (False, True):
        assert torch.equal(Decoder(narrow, 3, 30, static=static).generate(prompts, 12), reference(narrow, prompts, 12))


def test_a_decoder_can_be_used_again_and_shares_its_cache():
    model = llama()
    first = Decoder(model, 2, 30, static=True)
    first.fill()
    assert first.storage[0][0].std() > 0.5, "random numbers"
    shorter = remove_layers(model, [0, 2])
    second = Decoder(shorter, 2, 30, static=True, beside=first)
    assert second.storage[0][0].data_ptr() == first.storage[0][0].data_ptr()
    for _ in range(2):  # what the other one left in the cache does not matter
        for decoder in (first, second):
            prompts = prompts_for(model, rows=2)
            assert torch.equal(decoder.generate(prompts, 9), reference(decoder.model, prompts, 9))


def test_steps_go_on_from_where_one_seeks():
    model = llama()
    prompts = prompts_for(model)
    for static in (False, True):
        decoder = Decoder(model, 3, 20, static=static)
        tokens = decoder.generate(prompts, 8)
        decoder.seek(5)
        decoder.tokens.copy_(tokens[:, :1])
        decoder.steps(3)
        assert decoder.place.length == 8
        assert torch.equal(decoder.tokens, tokens[:, 3:4])


def test_requests_that_cannot_be_met_are_refused():
    model = llama()
    decoder = Decoder(model, 2, 8)
    with pytest.raises(ValueError, match=r"do not fit 2 rows of 8 tokens"):
        decoder.prefill(prompts_for(model, rows=3))
    with pytest.raises(ValueError, match=r"do not fit 2 rows of 8 tokens"):
        decoder.prefill(prompts_for(model, rows=2, length=8))
    decoder.prefill(prompts_for(model, rows=2))
    with pytest.raises(ValueError, match="5 tokens and 4 more do not fit a cache of 8"):
        decoder.steps(4)
    with pytest.raises(ValueError, match="length=9"):
        decoder.seek(9)
    with pytest.raises(ValueError, match="rows=0"):
        Decoder(model, 0, 8)
    with pytest.raises(ValueError, match="the memory beside is of another model or size"):
        Decoder(model, 3, 8, beside=decoder)
    with pytest.raises(ValueError, match="the memory beside is of another model or size"):
        Decoder(model, 2, 8, beside=Decoder(remove_layers(model, [1]), 2, 8))


def test_models_whose_steps_are_of_another_kind_are_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    windowed = Auto.from_config(MistralConfig(vocab_size=97, sliding_window=16, **sizes))
    Decoder(windowed, 1, 16)
    with pytest.raises(UnsupportedModel, match="mistral model attends to 16 tokens: 17 do not fit"):
        Decoder(windowed, 1, 17)
    recurrent = Auto.from_config(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(UnsupportedModel, match="a mamba model takes no position_ids"):
        Decoder(recurrent, 1, 8)


def test_the_size_of_a_cache():
    shape = CacheShape.of(llama(), rows=3, capacity=7)
    storage = shape.allocate(llama())
    assert shape.numel() == sum(one.numel() for pair in storage for one in pair) == 2 * 4 * 2 * 16 * 3 * 7


# ----------------------------------------------------------------------------------------------------------- on a GPU


@needs_cuda
@pytest.mark.parametrize("family", [llama, neox])
def test_graphs_give_the_tokens_of_plain_steps(family):
    model = family().cuda()
    prompts = prompts_for(model)
    expected = reference(model, prompts, 20)
    decoder = Decoder(model, 3, 90)
    assert decoder.static
    for _ in range(2):
        assert torch.equal(decoder.generate(prompts, 20), expected)
    longer = prompts_for(model, length=60)
    assert torch.equal(decoder.generate(longer, 20), reference(model, longer, 20))
    assert torch.equal(Decoder(model, 3, 90, static=False).generate(prompts, 20), expected)


@needs_cuda
def test_graphs_without_triton_give_the_same_tokens(monkeypatch):
    monkeypatch.setattr("prunelib.speed.decoding._triton_is_there", lambda: False)
    model = llama().cuda()
    assert not reads_filled_part(model, static=True)
    prompts = prompts_for(model)
    assert torch.equal(Decoder(model, 3, 40).generate(prompts, 20), reference(model, prompts, 20))


@needs_cuda
def test_compiled_layers_give_the_same_tokens():
    model = llama().cuda()
    prompts = prompts_for(model)
    expected = reference(model, prompts, 20)
    shorter = remove_layers(model, [2])
    expected_shorter = reference(shorter, prompts, 20)
    decoder = Decoder(remove_layers(model, []), 3, 40, compiled=True)
    assert torch.equal(decoder.generate(prompts, 20), expected)
    other = Decoder(shorter, 3, 40, compiled=True, beside=decoder)
    assert torch.equal(other.generate(prompts, 20), expected_shorter)


@needs_cuda
def test_a_sliced_model_is_captured():
    narrow = decided(random_sliced(llama().config, constant(4, 64, 0.25, multiple=8), device="cuda"))
    prompts = prompts_for(narrow)
    assert torch.equal(Decoder(narrow, 3, 40).generate(prompts, 12), reference(narrow, prompts, 12))


@needs_cuda
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "dtype"),
    [
        (32, 8, 128, torch.bfloat16),
        (32, 8, 128, torch.float32),
        (4, 4, 64, torch.float16),
        (5, 5, 32, torch.float32),
        (14, 2, 64, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("position", [0, 63, 64, 700, 1999])
def test_attention_reads_the_filled_part_and_nothing_else(heads, key_heads, size, dtype, position):
    pytest.importorskip("triton")
    from prunelib.speed.decode_attention import attend

    query = torch.randn(2, 1, heads, size, device="cuda", dtype=dtype).transpose(1, 2)
    keys, values = (torch.randn(2, key_heads, 2000, size, device="cuda", dtype=dtype) for _ in range(2))
    keys[:, :, position + 1 :] = float("nan")
    values[:, :, position + 1 :] = float("nan")
    found = attend(query, keys, values, torch.tensor([position], device="cuda"), size**-0.5)
    there = [one[:, :, : position + 1].double().repeat_interleave(heads // key_heads, dim=1) for one in (keys, values)]
    weights = (query.double() @ there[0].transpose(2, 3) * size**-0.5).softmax(dim=-1)
    expected = (weights @ there[1]).transpose(1, 2)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
