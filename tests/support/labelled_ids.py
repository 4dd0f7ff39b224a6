"""Random token ids with labels, as a trainer takes them."""

import torch


class LabelledIds(torch.utils.data.Dataset):
    """Of three classes; with masks the ends of some do not count."""

    def __init__(self, n=16, length=6, *, masked=False):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 30, (n, length), generator=generator)
        self.labels = torch.randint(0, 3, (n,), generator=generator)
        self.lengths = torch.randint(2, length + 1, (n,), generator=generator)
        self.masked = masked

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        item = {"input_ids": self.ids[i], "labels": self.labels[i]}
        if self.masked:
            item["attention_mask"] = (torch.arange(self.ids.shape[1]) < self.lengths[i]).long()
        return item
