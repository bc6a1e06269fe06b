"""Whether a student reads the teacher's token ids."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from alembert.common.errors import InputError

_SPECIAL_TOKENS = ("pad", "cls", "sep", "mask", "unk", "bos", "eos")


def check_vocabulary(
    student: str,
    config: PreTrainedConfig,
    student_tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raises InputError when a student cannot read the teacher's token ids.

    Args:
        student: its name or folder, for the message.
        config: the student's configuration.
        student_tokenizer: the one beside the student; where there is none, only the sizes can be compared.
        teacher_tokenizer: the one that the texts are encoded with.
    """
    way_out = (
        "both must read the same token ids: choose a shape such as 4x312, which has the teacher's vocabulary, "
        "or a checkpoint that was distilled with the teacher's tokenizer"
    )
    if config.vocab_size < len(teacher_tokenizer):
        raise InputError(
            f"{student} has embeddings for {config.vocab_size} tokens, the teacher's tokenizer has "
            f"{len(teacher_tokenizer)}; {way_out}"
        )
    if student_tokenizer is None:
        return
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        differing = sum(ours.get(token) != index for token, index in theirs.items())
        raise InputError(
            f"{student} has a vocabulary of {len(ours)} tokens, the teacher one of {len(theirs)}, and {differing} of "
            f"the teacher's tokens have no or another id there; {way_out}"
        )
    for name in _SPECIAL_TOKENS:
        own, other = (
            getattr(tokenizer, f"{name}_token_id", None)
            for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        if own != other:
            raise InputError(
                f"{student} has a vocabulary of {len(ours)} tokens and the teacher one of {len(theirs)}, but the "
                f"{name} token has id {own} there and {other} in the teacher; {way_out}"
            )
