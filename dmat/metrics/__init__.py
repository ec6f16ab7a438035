"""Numbers and pictures about results: intervals of accuracies, quality of generated images, curves and sheets.

Takes arrays, knows neither where they came from nor where they go.
"""
