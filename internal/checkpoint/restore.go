package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/internal/rmtree"
)

// RestoreOptions say where to.
type RestoreOptions struct {
	Dir    string // missing or empty; its parent exists
	IDBase uint32 // host id of the container's root
	// Progress is told of bytes written, now and then, from one goroutine at a time.
	Progress func(done, total int64)
}

// partial is beside Dir while it is being filled.
const partial = ".partial"

// Restore fills Dir with a checkpoint; id "" is the newest. The tree is made beside
// Dir and takes its place once it is whole and on disk: what is at Dir is all or
// nothing. Returns ErrNotFound, ErrDamaged, ErrKey, ErrExists if Dir is not empty.
func (s *Session) Restore(ctx context.Context, id string, opts RestoreOptions) (*Manifest, error) {
	m, all, err := s.open(ctx, id)
	if err != nil {
		return nil, err
	}
	dir := filepath.Clean(opts.Dir)
	if names, err := os.ReadDir(dir); err == nil && len(names) > 0 {
		return nil, fmt.Errorf("restore %s: %w: %s is not empty", m.ID, ErrExists, dir)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	tmp := dir + partial
	if err := rmtree.Remove(tmp); err != nil {
		return nil, fmt.Errorf("remove the rest of a restore: %w", err)
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return nil, err
	}
	root, err := unix.Open(tmp, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(root)
	r := &restore{s: s, m: m, root: root, ids: ids{opts.IDBase}, all: all, progress: opts.Progress}
	if err := r.run(ctx); err != nil {
		err = fmt.Errorf("restore %s: %w", m.ID, s.gone(ctx, m.ID, err))
		return nil, errors.Join(err, rmtree.Remove(tmp))
	}
	// Not os.Rename, which does not replace an empty folder.
	if err := unix.Rename(tmp, dir); err != nil {
		return nil, fmt.Errorf("rename %s to %s: %w", tmp, dir, err)
	}
	return m, atomicfile.SyncDir(filepath.Dir(dir))
}

// open reads a manifest and its whole tree.
func (s *Session) open(ctx context.Context, id string) (*Manifest, []entry, error) {
	if id == "" {
		h, err := s.Head(ctx)
		if err != nil {
			return nil, nil, err
		}
		if id = h.Manifest; id == "" {
			return nil, nil, fmt.Errorf("%w: %q has none yet", ErrNotFound, s.prefix)
		}
	}
	m, err := s.Manifest(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	all, err := s.entries(ctx, m, true)
	return m, all, err
}

type restore struct {
	s        *Session
	m        *Manifest
	root     int
	ids      ids
	all      []entry
	progress func(done, total int64)

	total   int64
	done    atomic.Int64
	telling atomic.Bool
}

// target is where a chunk goes.
type target struct {
	c   *chunk
	e   *entry
	off int64
}

// byBlock gives the targets of each block, in the order of the block.
func byBlock(all []entry) (blocks []*block, targets map[*block][]target, total int64) {
	targets = map[*block][]target{}
	for i := range all {
		e := &all[i]
		off := int64(0)
		for _, x := range e.ext {
			if x.c != nil {
				if targets[x.c.blk] == nil {
					blocks = append(blocks, x.c.blk)
				}
				targets[x.c.blk] = append(targets[x.c.blk], target{x.c, e, off})
				total += int64(x.c.n)
			}
			off += x.size()
		}
	}
	for _, ts := range targets {
		slices.SortStableFunc(ts, func(a, b target) int { return int(a.c.off) - int(b.c.off) })
	}
	return blocks, targets, total
}

// run makes folders, then files as their blocks arrive, then links, and at last
// gives folders their modes and times.
func (r *restore) run(ctx context.Context) error {
	for i := range r.all[1:] {
		e := &r.all[1+i]
		var err error
		switch {
		case e.kind == kindDir:
			err = r.at(e.path, func(dir int, name string) error { return unix.Mkdirat(dir, name, 0o700) })
		case e.kind == kindFile && len(e.ext) != 1 || e.kind == kindFile && e.ext[0].c == nil:
			err = r.create(e)
		}
		if err != nil {
			return fmt.Errorf("make %q: %w", e.path, err)
		}
		if i%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
	}
	blocks, targets, total := byBlock(r.all)
	r.total = total
	r.tell()
	// Many requests at a time hide the store's distance, but many writers in one
	// folder only wait for one another.
	turn := make(chan struct{}, max(2, runtime.GOMAXPROCS(0)))
	err := r.s.r.fetch(ctx, blocks, func(b *block, plain []byte) error {
		turn <- struct{}{}
		defer func() { <-turn }()
		return r.block(targets[b], plain)
	})
	if err != nil {
		return err
	}
	for i := range r.all {
		e := &r.all[i]
		var err error
		switch e.kind {
		case kindSymlink:
			err = r.at(e.path, func(dir int, name string) error {
				return errors.Join(unix.Symlinkat(e.link, dir, name), r.dress(dir, name, e))
			})
		case kindFIFO:
			err = r.at(e.path, func(dir int, name string) error {
				return errors.Join(unix.Mknodat(dir, name, unix.S_IFIFO|0o600, 0), r.dress(dir, name, e))
			})
		case kindFile:
			if len(e.ext) > 1 {
				err = r.finish(e)
			}
		}
		if err != nil {
			return fmt.Errorf("make %q: %w", e.path, err)
		}
	}
	for i := range r.all {
		if e := &r.all[i]; e.kind == kindLink {
			if err := r.hardLink(e); err != nil {
				return fmt.Errorf("link %q to %q: %w", e.path, e.link, err)
			}
		}
	}
	for i := len(r.all) - 1; i >= 0; i-- {
		if e := &r.all[i]; e.kind == kindDir {
			if err := r.finish(e); err != nil {
				return fmt.Errorf("make %q: %w", e.path, err)
			}
		}
	}
	if err := unix.Syncfs(r.root); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	r.tell()
	return nil
}

// at calls f with the folder that holds path.
func (r *restore) at(path string, f func(dir int, name string) error) error {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return f(r.root, path)
	}
	dir, err := openBelow(r.root, path[:i], unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	return f(dir, path[i+1:])
}

// create makes a file that gets its content in parts, or has none.
func (r *restore) create(e *entry) error {
	fd, err := openBelow(r.root, e.path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if e.size > 0 {
		if err := unix.Ftruncate(fd, e.size); err != nil {
			return err
		}
	}
	if len(e.ext) > 1 {
		return nil
	}
	return r.dressFD(fd, e)
}

// block writes what a block holds, a file at a time.
func (r *restore) block(ts []target, plain []byte) error {
	var last *chunk
	var text []byte
	fd, open := -1, (*entry)(nil)
	closeFD := func() {
		if fd >= 0 {
			unix.Close(fd)
		}
		fd, open = -1, nil
	}
	defer closeFD()
	for _, t := range ts {
		if last == nil || last.id != t.c.id || last.off != t.c.off {
			var err error
			if text, err = r.s.r.content(t.c, plain); err != nil {
				return fmt.Errorf("%w (needed for %q)", err, t.e.path)
			}
			last = t.c
		}
		if open != t.e {
			closeFD()
			flags := unix.O_WRONLY
			if len(t.e.ext) == 1 {
				flags |= unix.O_CREAT | unix.O_EXCL
			}
			var err error
			if fd, err = openBelow(r.root, t.e.path, flags, 0o600); err != nil {
				return fmt.Errorf("make %q: %w", t.e.path, err)
			}
			open = t.e
		}
		if err := pwrite(fd, text, t.off); err != nil {
			return fmt.Errorf("write %q: %w", t.e.path, err)
		}
		if len(t.e.ext) == 1 {
			if err := r.dressFD(fd, t.e); err != nil {
				return fmt.Errorf("make %q: %w", t.e.path, err)
			}
		}
		r.done.Add(int64(len(text)))
	}
	r.tell()
	return nil
}

// tell reports progress; who finds another at it leaves it to that.
func (r *restore) tell() {
	if r.progress == nil || !r.telling.CompareAndSwap(false, true) {
		return
	}
	r.progress(r.done.Load(), r.total)
	r.telling.Store(false)
}

func pwrite(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// finish gives a folder, or a file that came in parts, its owner, mode and times.
func (r *restore) finish(e *entry) error {
	flags := unix.O_RDONLY
	if e.kind == kindDir {
		flags |= unix.O_DIRECTORY
	}
	fd, err := openBelow(r.root, e.path, flags, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return r.dressFD(fd, e)
}

// dressFD: the owner first, for a change of it drops setuid bits and capabilities.
func (r *restore) dressFD(fd int, e *entry) error {
	uid, gid := int(r.ids.outside(e.uid)), int(r.ids.outside(e.gid))
	if err := unix.Fchown(fd, uid, gid); err != nil {
		return fmt.Errorf("owner %d:%d: %w", uid, gid, err)
	}
	if err := unix.Fchmod(fd, e.mode); err != nil {
		return fmt.Errorf("mode %o: %w", e.mode, err)
	}
	for _, x := range e.xattrs {
		if err := writeXattr(fd, x, r.ids); err != nil {
			return fmt.Errorf("attribute %s: %w", x.name, err)
		}
	}
	ts := times(e.mtime)
	if err := unix.UtimesNanoAt(fd, "", ts, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("time: %w", err)
	}
	return nil
}

// dress is for what cannot be opened: symbolic links and FIFOs.
func (r *restore) dress(dir int, name string, e *entry) error {
	uid, gid := int(r.ids.outside(e.uid)), int(r.ids.outside(e.gid))
	if err := unix.Fchownat(dir, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("owner %d:%d: %w", uid, gid, err)
	}
	if e.kind == kindFIFO {
		if err := unix.Fchmodat(dir, name, e.mode, 0); err != nil {
			return fmt.Errorf("mode %o: %w", e.mode, err)
		}
	}
	return unix.UtimesNanoAt(dir, name, times(e.mtime), unix.AT_SYMLINK_NOFOLLOW)
}

func times(ns int64) []unix.Timespec {
	t := unix.NsecToTimespec(ns)
	return []unix.Timespec{t, t}
}

func (r *restore) hardLink(e *entry) error {
	return r.at(e.link, func(from int, first string) error {
		return r.at(e.path, func(to int, name string) error { return unix.Linkat(from, first, to, name, 0) })
	})
}
