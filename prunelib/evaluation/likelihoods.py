"""Log-likelihoods of many continuations under many removals of layers, with all that they share run once.

Three things are shared. Removals that keep the same first layers share what those layers return
(`layerwise.SharedPrefixEvaluator`). The
choices of one question share the beginning of their text: they lie in one row, the beginning once and the choices behind one
another, each blind to the others, with the positions that each would have by itself. And the final norm and the head run at
the scored positions only, which is a fraction of the text. The numbers are those of one text at a time, to float tolerance;
whether a model can be run in this way is tried on its own longest texts first, and what it cannot do is left out.
"""

import inspect
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.models.layerwise import LayerSet, LayerwiseModel, SharedPrefixEvaluator

Answer = tuple[float, bool]  # log-likelihood in nats; whether every token is the most likely one

WORTH = 0.9  # a row is shared when it is at most so long as its texts one by one: its attention mask is not free


@dataclass(frozen=True)
class Request:
    """A continuation to score.

    ``read`` is what the model reads, context and continuation without its last token; ``scored`` the continuation, whose
    tokens are predicted at the last ``len(scored)`` positions of ``read``. Requests of one ``item`` may share a beginning.
    """

    read: tuple[int, ...]
    scored: tuple[int, ...]
    item: Hashable


class LayerSetLikelihoods(dict[LayerSet, list[Answer]]):
    """Removed layers → one answer per request, and what it cost.

    ``layer_forwards`` counts the calls of decoder layers, over all batches; ``layer_forwards_alone`` is what every set by
    itself takes on the same batches. ``tokens`` counts the tokens in these batches without padding; ``tokens_alone`` is what
    they are when every request is a text of its own.
    """

    layer_forwards: int = 0
    layer_forwards_alone: int = 0
    tokens: int = 0
    tokens_alone: int = 0


@torch.inference_mode()
def layer_set_likelihoods(
    model: PreTrainedModel,
    requests: Sequence[Request],
    layer_sets: Iterable[LayerSet],
    *,
    batch_size: int = 16,
    softmax_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> LayerSetLikelihoods:
    """The log-likelihood of every request under the model without each of the given sets of layers.

    Equal, to float tolerance, to running ``remove_layers(model, removed)`` on one request at a time.

    Args:
        layer_sets: the removed layers or sublayers, each ascending; ``()`` is the dense model. Repeated sets are evaluated once.
        batch_size: requests in one batch; longest first.
        softmax_dtype: in which log-probabilities are computed, None for that of the logits.

    Raises:
        ValueError: no request, one whose continuation is empty or longer than what is read, ``batch_size`` below 1, a model in
            training mode, or a set that is not ascending, out of range, or everything.
        UnsupportedModel: as `layerwise.SharedPrefixEvaluator`.
    """
    if not requests or batch_size < 1 or model.training:
        raise ValueError(
            f"{len(requests)} requests, batch_size={batch_size}, a model in {'training' if model.training else 'eval'} mode: "
            "give at least one request, batch_size from 1, and call model.eval() first"
        )
    for number, request in enumerate(requests):
        if not 1 <= len(request.scored) <= len(request.read):
            raise ValueError(
                f"request {number}: {len(request.scored)} tokens to score on {len(request.read)} that are read: at least one "
                "token must be scored, behind at least one of context"
            )
    runs = SharedPrefixEvaluator(model, layer_sets)
    engine = runs.engine
    shared, single = _rows(requests, getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None))
    if shared and not _runs_shared(engine, max(shared, key=lambda row: max(row.positions))):
        shared, single = [], [part for row in (*shared, *single) for part in row.apart()]
    heads_alone = _heads_alone(engine, torch.tensor([requests[0].read[:1] * 2]))
    batches = [*_batches(shared, batch_size), *_batches(single, batch_size)] if runs.sets else []

    found = LayerSetLikelihoods((removed, [(0.0, False)] * len(requests)) for removed in runs.sets)
    steps = len(batches) * runs.layers_per_batch
    with tqdm(total=steps, desc=f"{len(runs.sets)} layer sets", unit="layer", disable=not progress) as bar:
        for rows in batches:
            batch = _Batch.of(rows, requests, engine.device)
            for removed, hidden in runs.walk(batch.embed(engine), bar):
                logits = batch.logits(engine, hidden, heads_alone=heads_alone)
                for number, answer in zip(batch.requests, batch.answers(logits, softmax_dtype), strict=True):
                    found[removed][number] = answer
                del logits  # before the next ones are made
    found.layer_forwards, found.layer_forwards_alone = runs.layer_forwards, runs.layer_forwards_alone
    found.tokens = sum(len(row.tokens) for rows in batches for row in rows)
    found.tokens_alone = sum(len(request.read) for request in requests)
    return found


# --- rows: texts that share a beginning ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """Texts that share their first ``beginning`` tokens, in one row: the beginning, then what each text adds.

    ``texts`` holds (the whole text, the requests that read it).
    """

    beginning: int
    texts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def tokens(self) -> list[int]:
        first = self.texts[0][0]
        return [*first[: self.beginning], *(token for text, _ in self.texts for token in text[self.beginning :])]

    @property
    def positions(self) -> list[int]:
        """Where each token of the row stands in its own text."""
        return [*range(self.beginning), *(i for text, _ in self.texts for i in range(self.beginning, len(text)))]

    @property
    def branches(self) -> list[int]:
        """0 for the beginning, from 1 for the texts."""
        return [
            *[0] * self.beginning,
            *(n for n, (text, _) in enumerate(self.texts, 1) for _ in text[self.beginning :]),
        ]

    def place(self, text: int, position: int) -> int:
        """Where in the row a position of a text lies."""
        if position < self.beginning:
            return position
        return position + sum(len(other) - self.beginning for other, _ in self.texts[:text])

    def apart(self) -> list["_Row"]:
        """Every text in a row of its own."""
        return [_Row(len(text), ((text, readers),)) for text, readers in self.texts]


def _rows(requests: Sequence[Request], longest: int | None) -> tuple[list[_Row], list[_Row]]:
    """Rows of several texts that share enough, and rows of one text; equal texts of one item are one.

    No row of several is longer than `longest`: some models hold tables of that size.
    """
    items: dict[Hashable, dict[tuple[int, ...], list[int]]] = {}
    for number, request in enumerate(requests):
        items.setdefault(request.item, {}).setdefault(request.read, []).append(number)
    shared, single = [], []
    for texts in items.values():
        row = _Row(_beginning(texts), tuple((text, tuple(readers)) for text, readers in texts.items()))
        enough = len(row.tokens) <= WORTH * sum(map(len, texts))
        if len(texts) > 1 and enough and (longest is None or len(row.tokens) <= longest):
            shared.append(row)
        else:
            single += row.apart()
    return shared, single


def _beginning(texts: Iterable[tuple[int, ...]]) -> int:
    """How many tokens all texts have in common at their beginning: as many as the first and the last in sorted order."""
    first, last = min(texts), max(texts)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _batches(rows: Sequence[_Row], batch_size: int) -> list[list[_Row]]:
    """Longest first; a batch is full when its rows hold `batch_size` requests."""
    found: list[list[_Row]] = []
    room = 0
    for row in sorted(rows, key=lambda row: (-len(row.tokens), row.tokens)):
        count = sum(len(readers) for _, readers in row.texts)
        if not found or count > room:
            found.append([])
            room = batch_size
        found[-1].append(row)
        room -= count
    return found


# --- one batch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Rows padded on the right: nothing that is scored can see the padding.

    ``scored`` lists the places (row, position) at which something is predicted, each once. For every predicted token,
    ``owner`` is its request (an index into ``requests``), ``where`` its place and ``token`` what has to be predicted.
    """

    ids: Int64[Tensor, "row position"]
    mask: Float[Tensor, "row 1 position position"] | None
    positions: Int64[Tensor, "row position"] | None
    requests: list[int]
    scored: Int64[Tensor, "place 2"]
    owner: Int64[Tensor, " predicted"]
    where: Int64[Tensor, " predicted"]
    token: Int64[Tensor, " predicted"]

    @classmethod
    def of(cls, rows: Sequence[_Row], requests: Sequence[Request], device: torch.device) -> "_Batch":
        width = max(len(row.tokens) for row in rows)
        places: dict[tuple[int, int], int] = {}
        numbers, owner, where, token = [], [], [], []
        for line, row in enumerate(rows):
            for index, (text, readers) in enumerate(row.texts):
                for number in readers:
                    scored = requests[number].scored
                    for offset, target in enumerate(scored):
                        place = (line, row.place(index, len(text) - len(scored) + offset))
                        owner.append(len(numbers))
                        where.append(places.setdefault(place, len(places)))
                        token.append(target)
                    numbers.append(number)
        several = any(len(row.texts) > 1 for row in rows)
        padded = {name: [_padded(getattr(row, name), width, fill) for row in rows] for name, fill in _FILL.items()}
        branches = torch.tensor(padded["branches"], device=device)
        return cls(
            ids=torch.tensor(padded["tokens"], device=device),
            mask=_blocked(branches) if several else None,
            positions=torch.tensor(padded["positions"], device=device) if several else None,
            requests=numbers,
            scored=torch.tensor(list(places), dtype=torch.int64, device=device).reshape(-1, 2),
            owner=torch.tensor(owner, dtype=torch.int64, device=device),
            where=torch.tensor(where, dtype=torch.int64, device=device),
            token=torch.tensor(token, dtype=torch.int64, device=device),
        )

    def embed(self, engine: LayerwiseModel) -> Float[Tensor, "row position hidden"]:
        """The input of the first layer, with the mask and the positions of these rows kept for the layers behind."""
        if self.mask is None:
            return engine.embed(self.ids)
        dtype = engine.model.dtype
        mask = self.mask.to(dtype) * torch.finfo(dtype).min
        return engine.embed(self.ids, attention_mask=mask, position_ids=self.positions)

    def logits(
        self, engine: LayerwiseModel, hidden: Float[Tensor, "row position hidden"], *, heads_alone: bool
    ) -> Float[Tensor, "place vocabulary"]:
        """Final norm and head at the scored places."""
        if heads_alone:
            return engine.head(_taken(hidden, self.scored)[:, None])[:, 0]
        return _taken(engine.head(hidden), self.scored)

    def answers(self, logits: Float[Tensor, "place vocabulary"], dtype: torch.dtype | None) -> list[Answer]:
        """One per request, in the order of ``requests``."""
        likelihoods = logits.log_softmax(-1, dtype=dtype)
        where, token, owner = (index.to(logits.device) for index in (self.where, self.token, self.owner))
        sums = torch.zeros(len(self.requests), dtype=torch.float64, device=logits.device)
        sums.index_add_(0, owner, likelihoods[where, token].double())
        missed = torch.zeros(len(self.requests), dtype=torch.int64, device=logits.device)
        missed.index_add_(0, owner, (likelihoods.argmax(-1)[where] != token).long())
        return list(zip(sums.tolist(), (missed == 0).tolist(), strict=True))


# Padding is a branch of its own: it sees itself, so that no row of the attention is empty, and nothing else sees it.
_FILL = {"tokens": 0, "positions": 0, "branches": -1}


def _taken(values: Tensor, places: Int64[Tensor, "place 2"]) -> Tensor:
    """``values[row, position]`` at every place, on the device of the values (a model may lie on several)."""
    line, position = places.T.to(values.device)
    return values[line, position]


def _padded(values: list[int], width: int, fill: int) -> list[int]:
    return values + [fill] * (width - len(values))


def _blocked(branches: Int64[Tensor, "row position"]) -> Float[Tensor, "row 1 position position"]:
    """1 where a position must not be seen: one that comes later, or one of another text."""
    seen: Bool[Tensor, "row query key"] = (branches[:, None, :] == branches[:, :, None]) | (branches[:, None, :] == 0)
    return (~seen.tril()).float()[:, None]


# --- what a model can do -------------------------------------------------------------------------------------------------


def _runs_shared(engine: LayerwiseModel, row: _Row) -> bool:
    """Whether the layers return for one row what they return for its texts one by one.

    Not so where attention is no matter of a mask (state-space and linear-attention layers), looks at distances in the row
    (ALiBi) or only at the last few tokens (sliding windows shorter than the text).
    """
    model = engine.model
    takes = inspect.signature(engine.forward).parameters
    known = {"sdpa", "eager"}  # the others read a mask of two dimensions
    if not {"attention_mask", "position_ids"} <= set(takes) or getattr(model.config, "_attn_implementation", "") not in known:
        return False
    tolerance = torch.finfo(model.dtype).eps ** 0.5
    row = _Row(row.beginning, tuple((text, ()) for text, _ in row.texts))  # nothing is scored here
    try:
        together = _through(engine, _Batch.of([row], [], engine.device))[0]
    except (TypeError, ValueError, RuntimeError, IndexError):  # a family that cannot read such a mask says so in its own way
        return False
    for index, alone in enumerate(row.apart()):
        places = [row.place(index, position) for position in range(len(alone.tokens))]
        wanted = _through(engine, _Batch.of([alone], [], engine.device))[0]
        if not torch.linalg.norm(together[places] - wanted) <= tolerance * torch.linalg.norm(wanted):
            return False
    return True


def _through(engine: LayerwiseModel, batch: _Batch) -> Float[Tensor, "row position hidden"]:
    hidden = batch.embed(engine)
    for index in range(engine.n_layers):
        hidden = engine.run_layer(index, hidden)
    return hidden


def _heads_alone(engine: LayerwiseModel, ids: Int64[Tensor, "1 two"]) -> bool:
    """Whether what follows the layers looks at one position at a time, as a norm and a linear head do."""
    hidden = engine.embed(ids)
    for index in range(engine.n_layers):  # in a sliced model, what leaves the layers is wider than what enters them
        hidden = engine.run_layer(index, hidden)
    hidden = torch.cat([hidden[:, :1], hidden[:, :1] * -0.5 + 1], dim=1)
    whole, alone = engine.head(hidden)[0], engine.head(hidden[0][:, None])[:, 0]
    return bool(torch.linalg.norm(whole - alone) <= torch.finfo(whole.dtype).eps ** 0.5 * torch.linalg.norm(whole))
