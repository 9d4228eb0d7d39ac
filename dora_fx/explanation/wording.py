"""How pictures and trees write what a description says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dora_fx.explanation.layer_parts import Box, GraphDescription, Message, Operand, TensorFacts, When

# Boxes of more ops are called by their module.
_OPS_IN_A_TITLE = 3
_KEPT_ONE_BY_ONE = 2


def bytes_text(nbytes: int | None) -> str:
    """Write a size: 96 B, 1.5 KiB, 12 MiB."""
    if nbytes is None:
        return "? B"
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}" if size < 10 else f"{size:.0f} {unit}"


def tensor_text(tensor: TensorFacts) -> str:
    """Write a tensor: [8, 1, 48] f32 1.5 KiB."""
    return f"[{', '.join(map(str, tensor.shape))}] {tensor.dtype} {bytes_text(tensor.nbytes)}"


def tensor_texts(tensors: Iterable[TensorFacts]) -> list[str]:
    """Write tensors, equal ones together."""
    return [
        f"{count} x {tensor_text(one)}" if count > 1 else tensor_text(one) for one, count in Counter(tensors).items()
    ]


def operand_texts(operands: Sequence[Operand]) -> list[tuple[str, str]]:
    """Write parameters and buffers, those of equal tensors together: (m, delta; [48] f32 192 B each)."""
    names: dict[TensorFacts, list[str]] = {}
    for operand in operands:
        names.setdefault(operand.tensor, []).append(operand.name)
    return [
        (", ".join(of_tensor), tensor_text(tensor) + " each" * (len(of_tensor) > 1))
        for tensor, of_tensor in names.items()
    ]


def message_text(message: Message) -> str:
    """Write messages: all_gather over 2, 1.5 KiB."""
    count = f"{message.count} x " if message.count > 1 else ""
    when = "bwd " if message.when == "backward" else ""
    return f"{when}{count}{message.kind} over {message.group_size}, {bytes_text(message.nbytes)}"


def kept_texts(box: Box) -> list[str]:
    """Write what a box keeps, and its shape where it is none of the box's outputs; many tensors as their sum."""
    kept = box.kept or ()
    if len(kept) > _KEPT_ONE_BY_ONE:
        return [f"kept {len(kept)} tensors, {bytes_text(_sum(tensor.nbytes for tensor in kept))}"]
    return [f"kept {bytes_text(one.nbytes) if one in box.outputs else tensor_text(one)}" for one in kept]


def title_of(box: Box, root: str) -> str:
    """Return what a box is called: by its ops, by its module if they are many, and by what it sends if it has none.

    One that does neither is an autograd function whose forward pass is the identity.
    """
    if box.part == "output":
        return "output"
    if box.part == "input":
        return box.name.rpartition(".")[2].removeprefix("l_").removesuffix("_")
    if len(box.ops) > _OPS_IN_A_TITLE:
        return box.path or root
    sent = " and ".join(dict.fromkeys(one.kind for one in box.messages if one.when == "forward"))
    return ", ".join(box.ops) or sent or "identity"


def ops_text(box: Box) -> str:
    """Write the ops of a box whose title does not, equal ones together; "" for others."""
    if len(box.ops) <= _OPS_IN_A_TITLE:
        return ""
    return ", ".join(f"{count} x {op}" if count > 1 else op for op, count in Counter(box.ops).items())


def totals_texts(graph: GraphDescription) -> list[str]:
    """Write what a graph sends and keeps in all."""
    texts = [_sent_text(graph, when) for when in ("forward", "backward")]
    kept = [tensor for box in graph.boxes for tensor in box.kept or ()]
    if any(box.kept is not None for box in graph.boxes):
        texts.append(f"kept for backward: {bytes_text(_sum(tensor.nbytes for tensor in kept))}")
    return texts


def _sent_text(graph: GraphDescription, when: When) -> str:
    sent = [message for box in graph.boxes for message in box.messages if message.when == when]
    if not sent:
        return f"{when}: nothing sent"
    nbytes = _sum(None if one.nbytes is None else one.nbytes * one.count for one in sent)
    count = sum(one.count for one in sent)
    return f"{when}: {count} message{'s' * (count > 1)}, {bytes_text(nbytes)}"


def _sum(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)
