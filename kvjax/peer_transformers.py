"""Times Hugging Face transformers' generation; runs in whatever Python has torch, and imports nothing of ours.

Reads a case a line from standard input, {"model", "batch", "context", "new_tokens"}, and answers each with a line,
{"seconds_per_step"}; the first line out says that it is ready, or what is missing.
"""

import json
import sys
import time
from typing import Any


def main() -> None:
    """Serves cases until the input ends."""
    try:
        import torch
        import transformers
    except ImportError as error:
        print(json.dumps({"missing": error.name}), flush=True)
        return
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"ready": versions, "threads": torch.get_num_threads()}), flush=True)
    models: dict = {}
    for line in sys.stdin:
        case = json.loads(line)
        if case["model"] not in models:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
            models[case["model"]] = loaded.eval()
        print(json.dumps({"seconds_per_step": time_case(models[case["model"]], case)}), flush=True)


def time_case(model: Any, case: dict) -> float:
    """Seconds of one decode step, prefill and first token apart."""
    import torch
    import transformers

    class Clock(transformers.StoppingCriteria):
        """Notes when each token is done; stops nothing."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor", **kwargs: object) -> "torch.Tensor":
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    clock = Clock()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (case["batch"], case["context"]), generator=generator)
    count = case["new_tokens"] + 1
    with torch.no_grad():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


if __name__ == "__main__":
    main()
