package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// walkers is how many folders are read at a time.
const walkers = 2

// scan is one walk over the tree that brings the writer's picture up to date.
type scan struct {
	w   *Writer
	ctx context.Context
	// take reads a file whose picture is old. It returns its content, or nil if
	// that will be put into the node later.
	take func(b *readBuffer, n *node, fd int, path string) (*content, error)
	// once: nothing will be read again after this walk (there is no freeze).
	once bool

	root int
	dev  uint64

	mu      sync.Mutex
	wake    sync.Cond
	todo    []task
	running int
	err     error
	touched int // names that are not as they were
	notes   []string
	linked  map[[2]uint64]*node // files with several names, read by this walk
}

type task struct {
	path string
	d    *dir
}

func (w *Writer) scan(ctx context.Context, s *scan) error {
	root, err := unix.Open(w.o.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", w.o.Dir, err)
	}
	defer unix.Close(root)
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return fmt.Errorf("stat %s: %w", w.o.Dir, err)
	}
	s.w, s.ctx, s.root, s.dev, s.linked = w, ctx, root, uint64(st.Dev), map[[2]uint64]*node{}
	s.wake.L = &s.mu
	s.todo = []task{{"", w.tree}}
	var g sync.WaitGroup
	for range walkers {
		g.Go(s.work)
	}
	g.Wait()
	if s.err == nil && w.tree.gone {
		s.err = fmt.Errorf("%s: %w", w.o.Dir, unix.ENOENT)
	}
	// A walk that failed has perhaps changed the picture, and the next one will not
	// see that again.
	if s.touched > 0 || s.err != nil {
		w.dirty = true
	}
	return s.err
}

// work takes folders, the last found first, so that few wait.
func (s *scan) work() {
	b := &readBuffer{dirents: make([]byte, 32<<10)}
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for len(s.todo) == 0 && s.running > 0 && s.err == nil {
			s.wake.Wait()
		}
		if s.err != nil || len(s.todo) == 0 {
			s.wake.Broadcast()
			return
		}
		t := s.todo[len(s.todo)-1]
		s.todo = s.todo[:len(s.todo)-1]
		s.running++
		s.mu.Unlock()
		more, touched, err := s.folder(b, t)
		s.mu.Lock()
		s.running--
		s.touched += touched
		s.todo = append(s.todo, more...)
		if err == nil {
			err = s.ctx.Err()
		}
		if err != nil && s.err == nil {
			s.err = err
		}
		s.wake.Broadcast()
	}
}

func (s *scan) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

// folder brings one folder up to date. d is whole only after it went through.
func (s *scan) folder(b *readBuffer, t task) (more []task, touched int, err error) {
	d := t.d
	whole := d.whole && !d.racy
	d.whole, d.gone = false, false
	fd, err := openRead(s.root, t.path, unix.O_DIRECTORY)
	if vanished(err) || errors.Is(err, unix.EXDEV) {
		// Its folder has changed and will be listed again in the frozen walk.
		d.gone = true
		if errors.Is(err, unix.EXDEV) {
			s.note("%q is another file system, which is not saved", t.path)
		}
		return nil, 1, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("open folder %q: %w", t.path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, 0, fmt.Errorf("stat %q: %w", t.path, err)
	}
	now := sigOf(&st)
	racy := now.racy()
	if !whole || d.sig != now {
		x, err := readXattrs(fd, s.w.ids)
		if err != nil {
			return nil, 0, fmt.Errorf("attributes of %q: %w", t.path, err)
		}
		names, err := readNames(fd, b.dirents)
		if err != nil {
			return nil, 0, fmt.Errorf("list %q: %w", t.path, err)
		}
		slices.Sort(names)
		old := d.nodes
		d.nodes, touched = merge(old, names)
		if !slices.Equal(x, d.xattrs) || d.sig.mode != now.mode || d.sig.mtime != now.mtime || d.sig.uid != now.uid || d.sig.gid != now.gid {
			touched++
		}
		d.xattrs = x
	}
	keep := d.nodes[:0]
	for i, n := range d.nodes {
		if i%256 == 0 && s.ctx.Err() != nil {
			err = s.ctx.Err()
		}
		var changed bool
		if err == nil {
			n, changed, err = s.name(b, fd, t.path, n)
		}
		if err != nil {
			// What is not looked at yet stays in the picture: it saves reading it again.
			d.nodes = append(keep, d.nodes[i:]...)
			return nil, 0, err
		}
		if changed {
			touched++
		}
		if n == nil {
			continue
		}
		keep = append(keep, n)
		if n.sub != nil {
			more = append(more, task{join(t.path, n.name), n.sub})
		}
	}
	d.nodes = keep
	d.sig, d.racy, d.whole = now, racy, true
	return more, touched, nil
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// merge gives a node for each of the names (sorted), the old one where there is.
// touched counts those that are gone.
func merge(old []*node, names []string) (nodes []*node, touched int) {
	nodes = make([]*node, 0, len(names))
	drop := func(n *node) {
		if n.kind != 0 { // else it was never looked at
			touched++
		}
	}
	for _, name := range names {
		for len(old) > 0 && old[0].name < name {
			drop(old[0])
			old = old[1:]
		}
		if len(old) > 0 && old[0].name == name {
			nodes = append(nodes, old[0])
			old = old[1:]
			continue
		}
		nodes = append(nodes, &node{name: name})
	}
	for _, n := range old {
		drop(n)
	}
	return nodes, touched
}

// readTries is how often a file that changes while it is read is read again where
// no frozen walk follows.
const readTries = 4

// name brings one name up to date: the node as it was if nothing changed, nil if
// it is not to be saved or gone.
func (s *scan) name(b *readBuffer, dir int, parent string, n *node) (*node, bool, error) {
	if x := s.w.o.Exclude; n.kind == 0 && x != nil {
		// Not even looked at: it may be a mount that hangs or is dead.
		if path := join(parent, n.name); x(path, false) && x(path, true) {
			return nil, false, nil
		}
	}
	var st unix.Stat_t
	for try := 1; ; try++ {
		err := unix.Fstatat(dir, n.name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if vanished(err) {
			return nil, true, nil
		}
		if err != nil {
			return nil, false, fmt.Errorf("stat %q: %w", join(parent, n.name), err)
		}
		if n.kind == kindDir && st.Mode&unix.S_IFMT == unix.S_IFDIR && uint64(st.Dev) == s.dev && n.sub.sig.ino == st.Ino {
			return n, false, nil // looked at when its turn comes
		}
		now := sigOf(&st)
		if n.sig == now && !n.racy && (n.kind != kindFile || n.content != nil) {
			return n, false, nil
		}
		fresh, again, err := s.fresh(b, dir, join(parent, n.name), n, now)
		if err != nil {
			return nil, false, err
		}
		if again && try == readTries {
			s.note("%q changed all the time while it was read", join(parent, n.name))
		} else if again {
			continue
		}
		// A name that was not saved and is not now is no change.
		return fresh, fresh != nil || n.kind != 0, nil
	}
}

// fresh makes a new node of a name. again: it changed under the hands.
func (s *scan) fresh(b *readBuffer, at int, path string, old *node, now sig) (n *node, again bool, err error) {
	isDir := now.mode&unix.S_IFMT == unix.S_IFDIR
	if s.w.o.Exclude != nil && s.w.o.Exclude(path, isDir) {
		return nil, false, nil
	}
	n = &node{name: old.name, sig: now, racy: now.racy()}
	if len(path) > maxTreePath {
		n.kind, n.link = kindSkip, fmt.Sprintf("its path is longer than %d bytes", maxTreePath)
		return n, false, nil
	}
	switch now.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if now.dev != s.dev {
			n.kind, n.link = kindSkip, "it is another file system"
			return n, false, nil
		}
		n.kind, n.sub = kindDir, &dir{}
		n.sub.sig.ino = now.ino
		return n, false, nil
	case unix.S_IFLNK:
		n.kind = kindSymlink
		n.link, err = readLink(at, n.name)
		if vanished(err) || errors.Is(err, unix.EINVAL) {
			return nil, true, nil
		}
		return n, false, err
	case unix.S_IFIFO:
		n.kind = kindFIFO
		return n, false, nil
	case unix.S_IFREG:
		n.kind = kindFile
	case unix.S_IFSOCK:
		n.kind, n.link = kindSkip, "it is a socket"
		return n, false, nil
	default:
		n.kind, n.link = kindSkip, "it is a device"
		return n, false, nil
	}
	if now.many {
		s.mu.Lock()
		twin := s.linked[[2]uint64{now.dev, now.ino}]
		s.mu.Unlock()
		if twin != nil && twin.sig == now && twin.content != nil {
			n.content, n.xattrs = twin.content, twin.xattrs
			return n, false, nil
		}
	}
	fd, err := openRead(at, n.name, 0)
	if errors.Is(err, unix.EXDEV) {
		n.kind, n.link = kindSkip, "it is another file system"
		return n, false, nil
	}
	if vanished(err) {
		return nil, true, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("open %q: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, false, fmt.Errorf("stat %q: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, true, nil
	}
	n.sig = sigOf(&st)
	n.racy = n.sig.racy()
	if n.xattrs, err = readXattrs(fd, s.w.ids); err != nil {
		return nil, false, fmt.Errorf("attributes of %q: %w", path, err)
	}
	if err := settle(fd, n.sig); err != nil {
		return nil, false, fmt.Errorf("write back %q: %w", path, err)
	}
	if n.content, err = s.take(b, n, fd, path); err != nil {
		return nil, false, err
	}
	if s.once {
		if err := unix.Fstat(fd, &st); err != nil {
			return nil, false, fmt.Errorf("stat %q: %w", path, err)
		}
		if after := sigOf(&st); after != n.sig {
			n.racy = true
			return n, true, nil
		}
	}
	if now.many && n.content != nil {
		s.mu.Lock()
		s.linked[[2]uint64{n.sig.dev, n.sig.ino}] = n
		s.mu.Unlock()
	}
	return n, false, nil
}

// differs walks the tree and says whether anything is not as in the picture.
func (w *Writer) differs(ctx context.Context) (bool, error) {
	root, err := unix.Open(w.o.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("open %s: %w", w.o.Dir, err)
	}
	defer unix.Close(root)
	todo := []task{{"", w.tree}}
	for len(todo) > 0 {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		t := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if !t.d.whole || t.d.racy {
			return true, nil
		}
		fd, err := openBelow(root, t.path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if vanished(err) || errors.Is(err, unix.EXDEV) {
			return true, nil
		}
		if err != nil {
			return false, fmt.Errorf("open folder %q: %w", t.path, err)
		}
		differs, err := folderDiffers(fd, t.d)
		unix.Close(fd)
		if differs || err != nil {
			return differs, err
		}
		for _, n := range t.d.nodes {
			if n.sub != nil {
				todo = append(todo, task{join(t.path, n.name), n.sub})
			}
		}
	}
	return false, nil
}

func folderDiffers(fd int, d *dir) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	if sigOf(&st) != d.sig {
		return true, nil
	}
	for _, n := range d.nodes {
		if n.sub != nil {
			continue
		}
		err := unix.Fstatat(fd, n.name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if vanished(err) {
			return true, nil
		}
		if err != nil {
			return false, fmt.Errorf("stat %q: %w", n.name, err)
		}
		if n.racy || sigOf(&st) != n.sig || n.kind == kindFile && n.content == nil {
			return true, nil
		}
	}
	return false, nil
}
