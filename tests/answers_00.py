"""Right and typically wrong answers to the exercise of chapter 00."""

RIGHT = {
    "model_input": {
        "permute": lambda image: image.permute(2, 0, 1)[None].float() / 255,
        "scaled first": lambda image: (image / 255).movedim(2, 0).unsqueeze(0),
        "batch first": lambda image: image.unsqueeze(0).permute(0, 3, 1, 2).float().div(255),
    },
}

WRONG = {
    "model_input": {
        "still the shape of the file": lambda image: image.float() / 255,
        "the batch dimension is missing": lambda image: image.permute(2, 0, 1).float() / 255,
        "the channels are last": lambda image: image[None].float() / 255,
        "the picture lies on its side": lambda image: image.permute(2, 1, 0)[None].float() / 255,
        "is behind the channels": lambda image: image.permute(2, 0, 1)[:, None].float() / 255,
        "the numbers are uint8": lambda image: image.permute(2, 0, 1)[None],
        "the numbers are float64": lambda image: image.permute(2, 0, 1)[None].double() / 255,
        "still run from 0 to 255": lambda image: image.permute(2, 0, 1)[None].float(),
        "by 255, not by 256": lambda image: image.permute(2, 0, 1)[None] / 256,
        "a dark image must stay dark": lambda image: image.permute(2, 0, 1)[None] / image.max(),
        "reshape never moves a number": lambda x: x.reshape(1, x.shape[2], *x.shape[:2]).float() / 255,
        "your code stopped with": lambda image: (image.permute(2, 0, 1) / 255).reshape(1, 3, 32, 32),
        "a pixel is not where it was": lambda image: image.permute(2, 0, 1)[None].flip(2) / 255,
        "a tensor is wanted": lambda image: image.permute(2, 0, 1)[None].numpy() / 255,
    },
}
