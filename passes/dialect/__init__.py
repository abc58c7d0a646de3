"""From what Dynamo or torch.export gives to the one dialect that all else reads: functional, pre-dispatch ATen."""
