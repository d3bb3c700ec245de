"""`python -m lad_kernels.frameworks.trl`: to LAD what `trl grpo` is to GRPO. TRL 1.15.1 to 1.16.

    accelerate launch -m lad_kernels.frameworks.trl --config lad.yaml --eta 0.5

TRL's own script, with its flags and YAML files (`GRPOScriptArguments`, `ModelConfig`, `DatasetMixtureConfig`), but
`LADConfig` for `GRPOConfig`, `LADTrainer` for `GRPOTrainer`, and an error for keys that nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

from lad_kernels.frameworks.trl import LADConfig, LADTrainer
from lad_kernels.frameworks.trl_options import require_trl


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as flags and `--config FILE.yaml` say; None: those of the process.

    Raises:
        ImportError: no supported TRL.
        SystemExit, ValueError: a flag or a key of the file that is unknown, or a value that cannot be used.
    """
    require_trl()
    import trl
    from trl.scripts import grpo

    kinds = (grpo.GRPOScriptArguments, LADConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    parser = trl.TrlParser(kinds, prog="python -m lad_kernels.frameworks.trl")
    with mock.patch.object(trl, "GRPOTrainer", LADTrainer):  # which the script imports when it runs
        grpo.main(*parser.parse_args_and_config(arguments))


if __name__ == "__main__":
    main()
