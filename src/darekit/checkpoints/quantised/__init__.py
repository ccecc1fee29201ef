# SPDX-License-Identifier: Apache-2.0
"""Quantised weights as numbers: a view of what is stored, decoded tile by tile when somebody reads it.

`naming` knows what belongs together, by names and formats; `told` what a config says; `building` makes a source of each
tensor, after all that headers can tell was checked; `codes`, `scales` and `sources` read and decode. What a code is
worth is defined in `formulas`, in plain numpy.
"""
