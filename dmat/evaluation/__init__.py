"""Evaluations that may be quoted: what must hold before a robust accuracy is called a headline.

Takes models, images and flags; knows neither parameter files nor jobs.
"""
