# SPDX-License-Identifier: Apache-2.0
"""Adapters on their bases, as models: LoRA and its relatives, of PEFT and mlx. Nothing is written anywhere."""
