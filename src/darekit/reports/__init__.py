# SPDX-License-Identifier: Apache-2.0
"""Pages to look at: a folder of results -> one HTML file that needs nothing else.

`kinds` says whose folder it is; `sweeps`, `evaluations`, `inspections` and `searches` each make a `Page` of theirs;
`charts` draws, as data for plotly; `markup` turns a page into HTML; `writing` puts it on the disk.
"""
