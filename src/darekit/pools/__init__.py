# SPDX-License-Identifier: Apache-2.0
"""The same work done in several places: in this process, in processes of this machine, or on a Ray cluster.

Work is a function that is made once in each place (it may hold a model) and called for each task. Pools know nothing
of models and recipes.
"""
