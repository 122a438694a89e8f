"""Trains a transformer on sequences that are spread over a mesh.

    python train.py --config configs/tiny.yaml
    python train.py --config configs/tiny.yaml --mesh.seq 8 --training.num-steps 500

The same command again resumes the run from its last checkpoint. On a pod every host
runs the same line: see docs/pods.md. Where the package is installed,
`python -m ulysses_jax.train` does the same.
"""

from ulysses_jax.train import start

if __name__ == "__main__":
    start("train.py")
