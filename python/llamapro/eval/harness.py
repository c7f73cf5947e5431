"""Our Llama as a model of lm-eval (EleutherAI's Language Model Evaluation Harness).

The requests are lm-eval's; tokens are those of the model's own tokenizer as transformers loads it,
which is what lm-eval's `hf` backend takes.
"""

from contextlib import contextmanager
from pathlib import Path

from llamapro.eval.scoring import score
from llamapro.generate import continue_all

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    raise ImportError(
        'evaluation by tasks needs the "eval" extra: pip install "llamapro-kernels[eval]"'
    ) from None

NEW_TOKENS = 256  # where a task says nothing: lm-eval's
