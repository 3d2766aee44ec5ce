"""How is a layer removed, and the model run and saved?"""

from prunelib.models.layers import (
    DENSE_PREFIX_COUNTS as DENSE_PREFIX_COUNTS,
)
from prunelib.models.layers import (
    DTYPES as DTYPES,
)
from prunelib.models.layers import (
    INEXPRESSIBLE as INEXPRESSIBLE,
)
from prunelib.models.layers import (
    LAYER_INDEX_ATTRIBUTES as LAYER_INDEX_ATTRIBUTES,
)
from prunelib.models.layers import (
    LAYER_INDEX_LISTS as LAYER_INDEX_LISTS,
)
from prunelib.models.layers import (
    PATHS as PATHS,
)
from prunelib.models.layers import (
    PER_LAYER_LISTS as PER_LAYER_LISTS,
)
from prunelib.models.layers import (
    CheckpointError as CheckpointError,
)
from prunelib.models.layers import (
    IdentityLayer as IdentityLayer,
)
from prunelib.models.layers import (
    UnsupportedModel as UnsupportedModel,
)
from prunelib.models.layers import (
    check_finite as check_finite,
)
from prunelib.models.layers import (
    check_vocabulary as check_vocabulary,
)
from prunelib.models.layers import (
    checked_device as checked_device,
)
from prunelib.models.layers import (
    checked_dtype as checked_dtype,
)
from prunelib.models.layers import (
    checkpoint_folder as checkpoint_folder,
)
from prunelib.models.layers import (
    decoder_layers as decoder_layers,
)
from prunelib.models.layers import (
    evaluating as evaluating,
)
from prunelib.models.layers import (
    final_norm as final_norm,
)
from prunelib.models.layers import (
    is_spread as is_spread,
)
from prunelib.models.layers import (
    keep_layers as keep_layers,
)
from prunelib.models.layers import (
    layers_path as layers_path,
)
from prunelib.models.layers import (
    load as load,
)
from prunelib.models.layers import (
    load_tokenizer as load_tokenizer,
)
from prunelib.models.layers import (
    parameter_count as parameter_count,
)
from prunelib.models.layers import (
    parameter_fraction as parameter_fraction,
)
from prunelib.models.layers import (
    probe_tokens as probe_tokens,
)
from prunelib.models.layers import (
    remove_layers as remove_layers,
)
from prunelib.models.layers import (
    removed_fraction as removed_fraction,
)
from prunelib.models.layers import (
    save as save,
)
from prunelib.models.layers import (
    scratch_beside as scratch_beside,
)
from prunelib.models.layers import (
    with_layers as with_layers,
)
