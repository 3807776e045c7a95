"""Data, order and batches: sources and formats, the encoded cache, and the arithmetic that deals
rows into batches.
"""
