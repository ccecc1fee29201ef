# SPDX-License-Identifier: Apache-2.0
"""What stands for a model: opened here, and nowhere else."""
