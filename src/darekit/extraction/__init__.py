# SPDX-License-Identifier: Apache-2.0
"""`dare extract`: a model's delta as a LoRA adapter. See `darekit.extraction.writing`."""
