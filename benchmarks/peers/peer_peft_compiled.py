"""Hugging Face PEFT on PyTorch under `torch.compile`; that needs a C++ compiler."""

import peer_peft

if __name__ == "__main__":
    peer_peft.run(compiled=True)
