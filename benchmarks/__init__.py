"""Time, memory and accuracy of the package next to its peers.

pytest benchmarks/                 a small set on CPU, in three minutes
pytest benchmarks/ --bench-set full --save
                                   the 0.5B-model head on CPU; writes benchmarks/results/ and RESULTS.md
benchmarks/gpu.sh                  the experiments of a CUDA machine, in nine minutes
python -m benchmarks.report        RESULTS.md from benchmarks/results/
python -m benchmarks.plot          the sweep's picture from the same files
python -m benchmarks.studies.training, benchmarks.studies.policy_states
                                   whether routing changes training; what it leaves out on a trained policy
"""
