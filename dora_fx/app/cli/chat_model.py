"""A transformers model of a checkpoint, which writes its answers to stdout token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dora_fx.app.bases import fitting_in_memory
from dora_fx.app.errors import UserError
from dora_fx.files import check_readable, reading
from dora_fx.models import GENERATION_CONFIG, HFCheckpoint, apply_chat_template, empty_model


class ChatModel:
    """Generates with transformers.

    Args:
        checkpoint: weights, config and tokenizer.
        device: "cpu" or "cuda".
        options: `max_new_tokens`, `temperature`, `top_p`, `seed` and `raw`.

    Attributes:
        has_turns: whether prompts are formatted as turns of a conversation by the tokenizer's chat template.

    Raises:
        UserError: the weights do not fit on the device, or the folder's generation settings cannot be read.
    """

    def __init__(self, checkpoint: HFCheckpoint, device: str, options: dict[str, Any]) -> None:
        self._path = checkpoint.path
        self._tokenizer = checkpoint.tokenizer
        self._device = device
        self._settings = _settings(checkpoint, options)
        self._longest = checkpoint.config.max_position_embeddings
        self._vocab_size = checkpoint.config.vocab_size
        self.has_turns = bool(checkpoint.tokenizer.chat_template) and not options["raw"]
        with fitting_in_memory(f"{checkpoint.path}", "take a smaller model, or --device cpu"):
            self._model = _model(checkpoint).to(device)
        torch.manual_seed(options["seed"])

    def tokens_of_text(self, text: str) -> Tensor:
        """Tokenize the start of a text to `[n]`, without the end token that a tokenizer may add."""
        try:
            with reading(self._path, "give --raw another prompt, or check the tokenizer's files"):
                ids = list(self._tokenizer(text, verbose=False)["input_ids"])
        except ValueError as error:
            raise UserError(str(error)) from error
        while ids and ids[-1] == self._tokenizer.eos_token_id:
            ids.pop()
        return self._checked(ids)

    def tokens_of_turns(self, turns: list[dict[str, str]]) -> Tensor:
        """Tokenize a conversation with the chat template to `[n]`, up to the beginning of the next answer.

        Raises:
            UserError: the template refuses the turns or fails.
        """
        try:
            with reading(self._path, "the chat template refuses this; --raw does not use it"):
                text = apply_chat_template(self._tokenizer, turns, tokenize=False, add_generation_prompt=True)
                ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except ValueError as error:
            raise UserError(str(error)) from error
        return self._checked(ids)

    @torch.inference_mode()
    def answer(self, tokens: Tensor) -> str:
        """Generate after the tokens `[n]`, write the answer to stdout as it is generated, and return it.

        Raises:
            UserError: tokens and answer together may exceed the model's context.
        """
        from transformers import TextStreamer

        room = self._longest - self._settings.max_new_tokens
        if len(tokens) > room:
            raise UserError(
                f"--max-new-tokens: found {self._settings.max_new_tokens} after {len(tokens)} tokens of the prompt, "
                f"expected at most {self._longest} in all, the model's"
            )
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        prompt = tokens[None].to(self._device)
        generated = self._model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=self._settings, streamer=streamer
        )
        return str(self._tokenizer.decode(generated[0, len(tokens) :], skip_special_tokens=True))

    def _checked(self, ids: list[int]) -> Tensor:
        if not ids:
            raise UserError("--prompt: found no token in it, expected some text")
        if beyond := [index for index in ids if not 0 <= index < self._vocab_size]:
            token = self._tokenizer.convert_ids_to_tokens(beyond[0])
            raise UserError(
                f"{self._path}: the prompt has the token {token!r} with id {beyond[0]}, expected an id below "
                f"{self._vocab_size}, the model's vocabulary; the tokenizer is that of another model"
            )
        return torch.tensor(ids, dtype=torch.long)


def _model(checkpoint: HFCheckpoint) -> Any:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dtype = next(iter(checkpoint.state_dict.values())).dtype
    # `from_pretrained` of the config's class, which also computes buffers that no file has, such as rotary frequencies.
    model_class = type(empty_model(checkpoint.config))
    return model_class.from_pretrained(
        None, config=checkpoint.config, state_dict=checkpoint.state_dict, dtype=dtype
    ).eval()


def _settings(checkpoint: HFCheckpoint, options: dict[str, Any]) -> Any:
    """Make the generation settings from the options, with all end tokens that tokenizer, config and folder name."""
    from transformers import GenerationConfig

    ends = [checkpoint.tokenizer.eos_token_id, checkpoint.config.eos_token_id]
    file = checkpoint.path / GENERATION_CONFIG
    if checkpoint.path.is_dir() and file.exists():
        try:
            check_readable(file)
            with reading(file, "remove it, or download it again"):
                ends.append(GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True).eos_token_id)
        except ValueError as error:
            raise UserError(str(error)) from error
    known = {token for end in ends for token in (end if isinstance(end, list) else [end]) if token is not None}
    sampling = options["temperature"] > 0
    sampled = dict(temperature=options["temperature"], top_p=options["top_p"], top_k=0) if sampling else {}
    return GenerationConfig(
        max_new_tokens=options["max_new_tokens"],
        do_sample=sampling,
        eos_token_id=sorted(known) or None,
        pad_token_id=min(known, default=0),
        **sampled,
    )
