"""Many slides at a glance: how each ended, kept on disk, and the summaries that are made from that."""

from cellslide.batch.summary import PAGE_FILE, SUMMARY_FILE, Ledger, summary_folders, write_summary

__all__ = ["PAGE_FILE", "SUMMARY_FILE", "Ledger", "summary_folders", "write_summary"]
