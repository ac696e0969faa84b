package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type unixStat = syscall.Stat_t

// Extract unpacks a tar archive into the folder rel, which is made if it is
// missing. A file that is there is replaced, a folder is filled. Nothing lands
// outside of the folder, whatever names, links and the session's own processes do.
func (t Tree) Extract(ctx context.Context, rel string, r io.Reader) (files, bytes int64, err error) {
	defer func() {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			err = fmt.Errorf("%w: %w", ErrNoSpace, err)
		}
	}()
	if err := t.makeAll(rel); err != nil {
		return 0, 0, err
	}
	f, err := openDir(t.Root, rel)
	if err != nil {
		return 0, 0, fmt.Errorf("%w: %s is no folder: %w", ErrInvalid, rel, err)
	}
	defer f.Close()
	dir, err := rootOf(f)
	if err != nil {
		return 0, 0, err
	}
	defer dir.Close()
	sub := Tree{Root: dir, IDBase: t.IDBase, Loose: t.Loose}
	type stamped struct {
		name string
		h    *tar.Header
	}
	var dirs []stamped // their times come last: filling them changes them
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return files, bytes, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		if ctx.Err() != nil {
			return files, bytes, ctx.Err()
		}
		name := path.Clean(strings.TrimSuffix(h.Name, "/"))
		if !filepath.IsLocal(name) {
			return files, bytes, fmt.Errorf("%w: entry %q lies outside of the folder", ErrInvalid, h.Name)
		}
		if name == "." {
			continue
		}
		if err := sub.makeAll(path.Dir(name)); err != nil {
			return files, bytes, err
		}
		switch h.Typeflag {
		case tar.TypeDir:
			if err := sub.makeDir(name); err != nil {
				return files, bytes, err
			}
			dirs = append(dirs, stamped{name, h})
			continue
		case tar.TypeReg, 0: // old archives have the latter
			n, err := sub.file(name, h, in)
			bytes += n
			if err != nil {
				return files, bytes, err
			}
		case tar.TypeSymlink:
			if err := sub.replace(name); err != nil {
				return files, bytes, err
			}
			if err := dir.Symlink(h.Linkname, name); err != nil {
				return files, bytes, err
			}
			if err := t.meta(dir.Lchown(name, t.outside(h.Uid), t.outside(h.Gid))); err != nil {
				return files, bytes, err
			}
		case tar.TypeLink:
			from := path.Clean(h.Linkname)
			if !filepath.IsLocal(from) {
				return files, bytes, fmt.Errorf("%w: entry %q links to %q, outside of the folder", ErrInvalid, h.Name, h.Linkname)
			}
			if err := sub.replace(name); err != nil {
				return files, bytes, err
			}
			if err := dir.Link(from, name); err != nil {
				return files, bytes, fmt.Errorf("%w: entry %q: %w", ErrInvalid, h.Name, err)
			}
		case tar.TypeFifo:
			if err := sub.pipe(name, h); err != nil {
				return files, bytes, err
			}
		case tar.TypeXGlobalHeader:
			continue
		default:
			return files, bytes, fmt.Errorf("%w: entry %q is a device or of another kind that a session cannot have", ErrInvalid, h.Name)
		}
		files++
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := sub.settle(dirs[i].name, dirs[i].h); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return files, bytes, err
		}
	}
	return files, bytes, nil
}

func (t Tree) file(name string, h *tar.Header, r io.Reader) (int64, error) {
	if err := t.replace(name); err != nil {
		return 0, err
	}
	f, err := t.Root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(f, r)
	if err != nil {
		err = errors.Join(err, f.Close())
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			err = fmt.Errorf("%w: entry %q: %w", ErrInvalid, h.Name, err)
		}
		return n, err
	}
	// On the open file: the name may be another's by now. Owner first, as that
	// clears setuid bits.
	err = t.meta(f.Chown(t.outside(h.Uid), t.outside(h.Gid)))
	if err == nil {
		err = t.meta(f.Chmod(h.FileInfo().Mode()))
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return n, err
	}
	return n, t.times(name, h)
}

func (t Tree) pipe(name string, h *tar.Header) error {
	if err := t.replace(name); err != nil {
		return err
	}
	dir, err := openDir(t.Root, path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := t.meta(unix.Mknodat(int(dir.Fd()), path.Base(name), unix.S_IFIFO|uint32(h.Mode&0o777), 0)); err != nil {
		return err
	}
	return t.meta(t.Root.Lchown(name, t.outside(h.Uid), t.outside(h.Gid)))
}

func (t Tree) settle(name string, h *tar.Header) error {
	if err := t.meta(t.Root.Lchown(name, t.outside(h.Uid), t.outside(h.Gid))); err != nil {
		return err
	}
	if err := t.meta(t.Root.Chmod(name, h.FileInfo().Mode().Perm()|h.FileInfo().Mode()&(fs.ModeSetgid|fs.ModeSticky))); err != nil {
		return err
	}
	return t.times(name, h)
}

func (t Tree) times(name string, h *tar.Header) error {
	if h.ModTime.IsZero() {
		return nil
	}
	return t.meta(t.Root.Chtimes(name, time.Time{}, h.ModTime))
}

// replace makes room for a file. A folder gives way only if it is empty.
func (t Tree) replace(name string) error {
	err := t.Root.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("%w: %s is a folder with something in it, and a file in the archive", ErrInvalid, name)
	}
	return err
}

// makeDir makes a folder of the container's root; a link to a folder that is
// there counts as one.
func (t Tree) makeDir(name string) error {
	err := t.Root.Mkdir(name, 0o755)
	if err == nil {
		return t.meta(t.Root.Lchown(name, int(t.IDBase), int(t.IDBase)))
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	fi, err := t.Root.Stat(name)
	if err == nil && !fi.IsDir() {
		return fmt.Errorf("%w: %s is a file, and a folder in the archive", ErrInvalid, name)
	}
	return err
}

func (t Tree) makeAll(rel string) error {
	if rel == "." {
		return nil
	}
	for i := 0; i <= len(rel); i++ {
		if i == len(rel) || rel[i] == '/' {
			if err := t.makeDir(rel[:i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// Copy copies the folder rel of one tree to the same place in another.
func Copy(ctx context.Context, from, to Tree, rel string) error {
	if _, err := from.Root.Lstat(rel); err != nil {
		return notFound(rel, err)
	}
	r, w := io.Pipe()
	var writing sync.WaitGroup
	writing.Go(func() { w.CloseWithError(from.Write(ctx, rel, w)) })
	_, _, err := to.Extract(ctx, path.Dir(rel), r)
	if err == nil { // what is behind the archive's end
		_, err = io.Copy(io.Discard, r)
	}
	r.CloseWithError(err)
	writing.Wait()
	return err
}
