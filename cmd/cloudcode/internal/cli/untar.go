package cli

import (
	"archive/tar"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// unpacker writes a tar archive below a folder, and nothing anywhere else,
// whatever the archive's names and links say: the archive comes from a container
// that may be hostile. All it does goes through os.Root, which follows no link
// out of the folder; a name that leads out is an error.
//
// Kept are modes (without setuid and setgid), times, symbolic and hard links.
// Files belong to who runs this. A file appears when it is complete.
type unpacker struct {
	root *os.Root
	// rename maps an entry's clean name to where it goes, "." being the folder
	// itself; false leaves the entry out.
	rename func(string) (string, bool)
	// one allows a single entry that is no folder: a copy to a named file.
	one bool

	files, bytes int64
	skipped      []string
	folders      []folderEntry
}

type folderEntry struct {
	name string
	mode fs.FileMode
	time time.Time
}

// errEscape is what an entry that would land outside of the folder gets.
var errEscape = errors.New("would land outside of the destination")

// entryName returns an entry's name without "." and double slashes, or an error
// if it is absolute or leads out.
func entryName(name string) (string, error) {
	if strings.HasPrefix(name, "/") || strings.Contains(name, "\x00") {
		return "", fmt.Errorf("archive entry %q %w", name, errEscape)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fmt.Errorf("archive entry %q %w", name, errEscape)
		}
	}
	return path.Clean(name), nil
}

func (u *unpacker) unpack(r io.Reader) error {
	tr := tar.NewReader(r)
	for entries := 0; ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read the archive: %w", err)
		}
		name, err := entryName(h.Name)
		if err != nil {
			return err
		}
		name, ok := u.rename(name)
		if !ok {
			continue
		}
		if entries++; u.one && (entries > 1 || h.Typeflag == tar.TypeDir || h.Typeflag == tar.TypeLink) {
			return fmt.Errorf("archive entry %q %w: one file was asked for", h.Name, errEscape)
		}
		if err := u.entry(tr, h, name); err != nil {
			return fmt.Errorf("unpack %s: %w", plain(name), err)
		}
	}
	// The end of an archive is padded: what sends it must see that all was taken.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("read the archive: %w", err)
	}
	// Last, deepest first: a folder that may not be written to could not have
	// been filled, and what is put into it changes its time.
	slices.SortFunc(u.folders, func(a, b folderEntry) int { return cmp.Compare(b.name, a.name) })
	for _, f := range u.folders {
		if info, err := u.root.Lstat(f.name); err != nil || !info.IsDir() {
			continue // a later entry has replaced it
		}
		if err := u.root.Chmod(f.name, f.mode); err != nil {
			return err
		}
		if err := u.root.Chtimes(f.name, f.time, f.time); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) entry(r io.Reader, h *tar.Header, name string) error {
	mode := fs.FileMode(h.Mode) & fs.ModePerm
	if h.Typeflag == tar.TypeDir {
		return u.folder(name, mode, h.ModTime)
	}
	if name == "." {
		return fmt.Errorf("%w: it is no folder", errEscape)
	}
	if dir := path.Dir(name); dir != "." {
		if err := u.root.MkdirAll(dir, 0o777); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		if err := u.file(r, name, mode, h.ModTime); err != nil {
			return err
		}
		u.bytes += h.Size
	case tar.TypeSymlink:
		if err := u.replace(name, func(temp string) error { return u.root.Symlink(h.Linkname, temp) }); err != nil {
			return err
		}
	case tar.TypeLink:
		target, err := entryName(h.Linkname)
		if err != nil {
			return err
		}
		target, ok := u.rename(target)
		if !ok {
			return fmt.Errorf("it is a hard link to %q, which is not copied", h.Linkname)
		}
		if target == name {
			return nil
		}
		if err := u.replace(name, func(temp string) error { return u.root.Link(target, temp) }); err != nil {
			return err
		}
	default:
		u.skipped = append(u.skipped, name)
		return nil
	}
	u.files++
	return nil
}

func (u *unpacker) folder(name string, mode fs.FileMode, when time.Time) error {
	if name == "." {
		return nil // was there, or was just made by us
	}
	info, err := u.root.Lstat(name)
	switch {
	case err == nil && !info.IsDir():
		// Also a link to a folder: what follows must not be written through it.
		if err := u.root.Remove(name); err != nil {
			return err
		}
		fallthrough
	case errors.Is(err, fs.ErrNotExist):
		if err := u.root.MkdirAll(name, 0o777); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	// Ours to write to until the end.
	if err := u.root.Chmod(name, mode|0o700); err != nil {
		return err
	}
	u.folders = append(u.folders, folderEntry{name, mode, when})
	return nil
}

func (u *unpacker) file(r io.Reader, name string, mode fs.FileMode, when time.Time) error {
	return u.replace(name, func(temp string) error {
		f, err := u.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		if err == nil {
			err = f.Chmod(mode)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		return u.root.Chtimes(temp, when, when)
	})
}

// replace makes something under a name of its own and then puts it in place: in
// place of a link, not through it, and never half.
func (u *unpacker) replace(name string, make func(temp string) error) error {
	temp := path.Join(path.Dir(name), fmt.Sprintf(".cloudcode-%08x", rand.Uint32()))
	err := make(temp)
	if err == nil {
		err = u.root.Rename(temp, name)
	}
	if err != nil {
		_ = u.root.Remove(temp)
		return err
	}
	// Renaming a hard link onto another link to the same file does nothing.
	if _, err := u.root.Lstat(temp); err == nil {
		return u.root.Remove(temp)
	}
	return nil
}
