"""Time, memory and accuracy of the package next to its peers.

pytest benchmarks/                 a small set on CPU, in three minutes
pytest benchmarks/ --bench-set full --save
                                   the 0.5B-model head on CPU; writes benchmarks/results/ and RESULTS.md
benchmarks/gpu.sh                  the experiments of a CUDA machine, in ten minutes
python -m benchmarks.report        RESULTS.md from benchmarks/results/
python -m benchmarks.plot          the sweep's picture from the same files
python -m benchmarks.states        tokens of a pretrained policy, for the data named real: cached, or packed to carry
python -m benchmarks.studies.training
                                   whether routing changes training; `bfloat16`: the head on a CPU with AMX;
                                   `since FOLDER`: what has become slower since that checkout
"""
