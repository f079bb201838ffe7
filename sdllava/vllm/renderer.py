"""vLLM's renderer for this package's models: the questions are found in the text of the prompt, before it is tokens."""

from typing import Any

from vllm.renderers.hf import HfRenderer

from .processing import SDLlavaMultiModalProcessor


class SDLlavaRenderer(HfRenderer):
    """Hands each image's question to the multimodal processor, which only gets the prompt's token ids."""

    def _process_tokens(self, prompt: Any, **kwargs: Any) -> Any:
        return super()._process_tokens(self._with_questions(prompt), **kwargs)

    async def _process_tokens_async(self, prompt: Any, **kwargs: Any) -> Any:
        return await super()._process_tokens_async(self._with_questions(prompt), **kwargs)

    def _with_questions(self, prompt: Any) -> Any:
        """The prompt with the rule of `apply_chat_template` applied to its text, unless it has a question."""
        given = prompt.get("mm_processor_kwargs") or {}
        if not prompt.get("multi_modal_data") or "prompt" not in prompt or given.get("question") is not None:
            return prompt
        processor = self.get_mm_processor()
        assert isinstance(processor, SDLlavaMultiModalProcessor)
        questions = processor.info.questions(prompt["prompt"])
        return {**prompt, "mm_processor_kwargs": {**given, "question": questions}}
