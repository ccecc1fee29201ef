# SPDX-License-Identifier: Apache-2.0
"""darekit: absorb the abilities of fine-tuned models into one."""

__version__ = "0.1.0"
