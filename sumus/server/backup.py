"""Backup and restore of a server's folder.

    back_up(data, folder)              also while it runs: rows as they are at one moment, and every model they point to
    restore(folder, data)              into a folder without a server: a new epoch begins, and open rounds are given up

What would open a sum stays where it is: no key, no seed and no sum of an open round is in a backup.
"""
