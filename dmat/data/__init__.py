"""Images on disk and on their way into a batch: sources, splits, shards, mixing, augmentation.

Images are uint8 [N, H, W, C] on disk and float32 [B, C, H, W] in [0, 1] in a batch; labels are int64. N images, B
batch, H height, W width, C channels.
"""
