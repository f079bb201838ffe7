"""Pushing checkpoints to the Hub: files, model card and the records that the card is made from."""
