"""Our Llama as a model of lm-eval, EleutherAI's Language Model Evaluation Harness.

Prompts, requests and metrics are lm-eval's; tokens are those of the model's own tokenizer as
transformers loads it, as for lm-eval's `hf` backend, whose numbers these are.
"""

from collections import defaultdict

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
    from transformers import AutoTokenizer
except ImportError:
    raise ImportError(
        'evaluation by tasks needs the "eval" extra: pip install "llamapro-kernels[eval]"'
    ) from None

from llamapro.eval.completion import Completer
from llamapro.eval.scoring import score

NEW_TOKENS = 256  # where a task says nothing, as with lm-eval's backends
SAMPLING = ("temperature", "top_p")


def tokenizer_of(path):
    """The tokenizer of a directory. Raises ValueError for one without an end of sequence."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: a tokenizer with an end of sequence expected, got none")
    return tokenizer


class Harness(TemplateLM):
    """A `Llama` and the directory that its tokenizer is in, for `lm_eval.simple_evaluate`.

    rows: how many texts are generated at a time.
    """

    def __init__(self, model, path, rows: int = 8):
        super().__init__()
        self.model, self.completer = model, Completer(model, path, rows)
        self.tokenizer = tokenizer_of(path)
        self._device = model.norm.device

    @property
    def eot_token_id(self) -> int:
        """What a text ends with."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context begins with."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """The text of messages by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
        """The ids of a text, with the tokenizer's special ones unless it begins with the first."""
        begun = string.startswith(self.tokenizer.decode(self.prefix_token_id))
        special = not begun if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, **({} if special else {"add_special_tokens": False}))

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            pairs = [(context, asked) for _, context, asked in requests]
            return [(s.log_likelihood, s.greedy) for s in score(self.model, pairs, bar.update)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that overlap by one token."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, found):
                windows.append((None, *window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (log_likelihood, _) in zip(owners, scored, strict=True):
            totals[owner] += log_likelihood
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop sequence, which is left out."""
        kinds = defaultdict(list)  # requests by what they say of sampling, ends and length
        for place, request in enumerate(requests):
            said = normalize_gen_kwargs(request.args[1], NEW_TOKENS)
            stop = tuple(handle_stop_sequences(said.get("until"), eos=None))
            sampling = tuple((name, said[name]) for name in SAMPLING if name in said)
            kinds[stop, said["max_gen_toks"], sampling].append(place)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for (stop, length, sampling), places in kinds.items():
                prompts = [self.tok_encode(requests[place].args[0]) for place in places]
                found = self.completer.continued(
                    prompts, length, stop, tell=bar.update, **dict(sampling)
                )
                for place, text in zip(places, found, strict=True):
                    texts[place] = text
        return texts
