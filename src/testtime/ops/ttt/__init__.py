"""What TTT-Linear and TTT-MLP share: inner loss, state, chunk grid, and the loop over chunks.

Source: Sun et al., "Learning to (learn at test time): RNNs with expressive hidden states", ICML
2025 (arXiv 2407.04620); the position coefficient is in the authors' code only.
"""
