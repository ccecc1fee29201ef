# SPDX-License-Identifier: Apache-2.0
"""Models that run: built in torch's memory from a plan or a checkpoint, fed with data, their weights replaced in place.

What needs torch to compute (statistics, similarity, sweeps, evaluation) goes through here; merging never does.
"""
