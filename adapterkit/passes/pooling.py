"""QA-LoRA (arXiv 2309.14717): factors of pooled inputs, on a base that is quantised with GPTQ.

On any other base PEFT 0.21.2 leaves `use_qalora` aside and trains A over all inputs. The adapter's
file is the same but for the width of A, so what it means only the base decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import BaseRequiredError
from adapterkit.keys import Role
from adapterkit.model.declared import UNDECIDED
from adapterkit.notes import Note
from adapterkit.passes.protocol import Context, Passed

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet


def decided(adapter: AdapterTensorSet, context: Context) -> Passed:
    """Return the update that the factors are on this base.

    Raises:
        BaseRequiredError: if inputs may be pooled and the base is unknown.
    """
    if not adapter.pooled_inputs:
        return Passed(adapter)
    if context.base is None:
        path = adapter.provenance.path if adapter.provenance else None
        raise BaseRequiredError(UNDECIDED, path=path)
    from adapterkit.base.schemes import quantisation_method

    if quantisation_method(context.base) != "gptq":
        note = "use_qalora is left aside, as PEFT does on a base that is not GPTQ"
        return Passed(adapter.replace(pooled_inputs=0), (Note(note),))
    return Passed(_unpooled(adapter), (Note("pooled inputs (use_qalora) written out in full"),))


def _unpooled(adapter: AdapterTensorSet) -> AdapterTensorSet:
    """Undo the pooling: x is averaged over groups of g inputs, then times in / g.

    So A' repeats every column g times, and the update is scaled by in / g².
    """
    import numpy as np

    group = adapter.pooled_inputs
    tensors, scales = dict(adapter.tensors), dict(adapter.scales)
    for key, a in adapter.tensors.items():
        if key.role is Role.LORA_A and a.shape:
            shape = (*a.shape[:-1], a.shape[-1] * group)
            tensors[key] = a.map(lambda x: np.repeat(x, group, axis=-1), shape=shape)
            scales[key.module] *= a.shape[-1] / group
    return adapter.replace(tensors=tensors, scales=scales, pooled_inputs=0)
