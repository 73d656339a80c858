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
        "as it is": (lambda image: image.float() / 255, "still the shape of the file"),
        "no batch": (lambda image: image.permute(2, 0, 1).float() / 255, "the batch dimension is missing"),
        "channels last": (lambda image: image[None].float() / 255, "the channels are last"),
        "on its side": (lambda image: image.permute(2, 1, 0)[None].float() / 255, "the picture lies on its side"),
        "batch in the middle": (lambda image: image.permute(2, 0, 1)[:, None].float() / 255, "is behind the channels"),
        "uint8": (lambda image: image.permute(2, 0, 1)[None], "the numbers are still uint8"),
        "double": (lambda image: image.permute(2, 0, 1)[None].double() / 255, "the numbers are float64"),
        "0 to 255": (lambda image: image.permute(2, 0, 1)[None].float(), "still run from 0 to 255"),
        "256": (lambda image: image.permute(2, 0, 1)[None] / 256, "by 255, not by 256"),
        "own maximum": (lambda image: image.permute(2, 0, 1)[None] / image.max(), "a dark image must stay dark"),
        "reshape": (lambda x: x.reshape(1, x.shape[2], *x.shape[:2]).float() / 255, "reshape never moves a number"),
        "fixed sizes": (lambda image: (image.permute(2, 0, 1) / 255).reshape(1, 3, 32, 32), "your code stopped with"),
        "upside down": (lambda image: image.permute(2, 0, 1)[None].flip(2) / 255, "a pixel is not where it was"),
        "numpy": (lambda image: image.permute(2, 0, 1)[None].numpy() / 255, "a tensor is wanted"),
    },
}
