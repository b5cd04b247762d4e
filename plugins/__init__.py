"""The standard plugins: one algorithm a file. kdkit finds them through the entry point
`standard`, like anyone else's.
"""
