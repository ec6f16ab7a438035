"""Numbers and pictures of results: confidence intervals of accuracies, quality of generated images, plots.

Functions take arrays and know neither where these come from nor where results go.
"""
