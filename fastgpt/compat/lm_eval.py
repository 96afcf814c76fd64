"""A run as a model of lm-evaluation-harness (EleutherAI), whose tasks then run on it.

    from fastgpt.compat.lm_eval import harness_model
    import lm_eval

    lm_eval.simple_evaluate(harness_model("runs/mine"), tasks=["lambada_openai"])

`Scorer` holds the arithmetic and needs nothing but this package; `harness_model` puts the harness's class over it. The three requests
are those of lm_eval.api.model.LM: `loglikelihood` (of a continuation, and whether it is the greedy one), `loglikelihood_rolling` (of a
whole text) and `generate_until`. One request at a time.
"""

import os
from collections.abc import Sequence
from typing import Any

from fastgpt.errors import UserError
from fastgpt.infer.evaluate import token_log_probs
from fastgpt.infer.generation import generate_text
from fastgpt.infer.run import load_run
from fastgpt.model import GPT

MAX_NEW_TOKENS = 256  # where a task gives no max_gen_toks


class Scorer:
    """Log probabilities and texts of a model.

    Args:
        model: a GPT.
        tokenizer: the one it was trained with.
    """

    def __init__(self, model: GPT, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def _encode(self, text: str) -> list[int]:
        try:
            if hasattr(self.tokenizer, "encode_ordinary"):
                return self.tokenizer.encode_ordinary(text)
            return self.tokenizer.encode(text)
        except ValueError as error:
            raise UserError(f"the tokenizer cannot encode a request: {error}") from error

    def _start(self) -> list[int]:
        """What stands before a text: the end-of-text token, or a line end."""
        if self.tokenizer.eot_token is not None:
            return [self.tokenizer.eot_token]
        return self._encode("\n")

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """(log probability of the continuation in nats, whether greedy decoding gives it).

        Blanks at the end of the context are counted to the continuation, as tokenizers join them to the word that follows.
        """
        stripped = context.rstrip()
        if stripped:
            context, continuation = stripped, context[len(stripped) :] + continuation
        before = self._encode(context) if context else self._start()
        whole = self._encode(context + continuation) if context else before + self._encode(continuation)
        if len(whole) <= len(before):
            return 0.0, True
        log_probs, greedy = token_log_probs(self.model, whole, len(before), stride=self.model.config.block_size)
        return log_probs.double().sum().item(), bool(greedy.all())

    def score_text(self, text: str) -> float:
        """Log probability of a whole text in nats, each token once, windows without overlap as the harness does it."""
        ids = [*self._start(), *self._encode(text)]
        if len(ids) < 2:
            return 0.0
        return token_log_probs(self.model, ids, stride=self.model.config.block_size)[0].double().sum().item()

    def generate_until(self, context: str, until: Sequence[str], **settings: Any) -> str:
        """Text after a context, up to the first of the strings in `until` (which is left out).

        Args:
            context: the prompt.
            until: strings that end the text.
            settings: max_gen_toks, do_sample, temperature, top_k, top_p, seed; greedy where do_sample is false or missing.
        """
        temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
        text = ""
        for piece in generate_text(
            self.model,
            self.tokenizer,
            context,
            int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
            temperature=temperature,
            top_k=settings.get("top_k"),
            top_p=settings.get("top_p"),
            seed=settings.get("seed", 1),
        ):
            text += piece
            found = [place for place in (text.find(stop) for stop in until if stop) if place >= 0]
            if found:
                return text[: min(found)]
        return text


def harness_model(run: str | os.PathLike[str], device: str = "cpu") -> Any:
    """A lm_eval.api.model.LM of a run folder.

    Args:
        run: the folder that training wrote.
        device: where the weights go.

    Raises:
        UserError: lm-eval is not installed, or as `load_run`.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError("lm-evaluation-harness is not installed: pip install lm-eval") from error
    scorer = Scorer(*load_run(run, device))

    class FastGPT(LM):
        """The harness's interface over a Scorer."""

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return [scorer.score(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return [scorer.score_text(*request.args) for request in requests]

        def generate_until(self, requests: Any) -> list[str]:
            texts = []
            for request in requests:
                context, settings = request.args[0], dict(request.args[1])
                until = settings.pop("until", [])
                texts.append(scorer.generate_until(context, [until] if isinstance(until, str) else until, **settings))
            return texts

    return FastGPT()
