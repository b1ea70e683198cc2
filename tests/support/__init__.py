"""What tests share: how programs start, what they are observed with, golden messages, contributions."""
