"""A static page on which visitors watch a model's tokens being reduced, in their own browser, on their own photographs.

`build` writes it; `web/` holds what the browser is given: HTML, CSS and modules, copied as they are.
"""
