// Package archive reads and writes a session's files as tar archives, on the
// host. The session's own processes may change the tree meanwhile, and are not
// trusted: all is done relative to an os.Root, no link is followed out of it, and
// nothing but regular files is opened.
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
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/container"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// Error classes.
var (
	ErrNotFound = errors.New("no such file or folder")
	ErrInvalid  = errors.New("invalid archive or path")
	ErrNoSpace  = errors.New("no space left in the session")
)

// Path turns what a user says into a path relative to /root/s3, "." for all of it.
// A relative one is below the project's folder.
func Path(p string) (string, error) {
	switch {
	case p == "":
		return ".", nil
	case strings.ContainsRune(p, 0):
		return "", fmt.Errorf("%w: %q has a NUL character", ErrInvalid, p)
	case !path.IsAbs(p):
		p = path.Join(container.ProjectDir, p)
	}
	p = path.Clean(p)
	if p == container.StorageDir {
		return ".", nil
	}
	rel, ok := strings.CutPrefix(p, container.StorageDir+"/")
	if !ok {
		return "", fmt.Errorf("%w: %s is not below %s, which is all that can be copied", ErrInvalid, p, container.StorageDir)
	}
	return rel, nil
}

// Tree is a session's files.
type Tree struct {
	Root   *os.Root // at /root/s3
	IDBase uint32   // of the session's ids on the host
	// Skip says what is left out when all of it is read; may be nil.
	Skip func(rel string, isDir bool) bool
	// Loose says that owners, modes and times need not stick: on a bucket they
	// cannot always.
	Loose bool
}

// meta passes on an error of setting an owner, a mode or a time.
func (t Tree) meta(err error) error {
	if t.Loose && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL)) {
		return nil
	}
	return err
}

// Size returns about how many bytes Write will write.
func (t Tree) Size(ctx context.Context, rel string) (int64, error) {
	var size int64
	err := t.walk(ctx, rel, func(_ *os.Root, _, _ string, fi fs.FileInfo) error {
		size += 1024
		if fi.Mode().IsRegular() {
			size += fi.Size() + 256
		}
		return nil
	})
	return size, err
}

// maxPath is the longest path that is read, in bytes: no program could use more. What
// lies deeper is left out.
const maxPath = unix.PathMax

// walk calls fn for a file or folder and all below it, folders first, with the
// folder that it is in and its name there. What goes away meanwhile, or becomes
// something else, is left out.
func (t Tree) walk(ctx context.Context, rel string, fn walkFunc) error {
	fi, err := t.Root.Lstat(rel)
	if err != nil {
		return notFound(rel, err)
	}
	w := walker{Tree: t, ctx: ctx, all: rel == ".", fn: fn}
	return w.visit(t.Root, rel, rel, fi)
}

type walkFunc func(dir *os.Root, name, rel string, fi fs.FileInfo) error

type walker struct {
	Tree
	ctx context.Context
	all bool
	fn  walkFunc
}

func (w *walker) visit(dir *os.Root, name, rel string, fi fs.FileInfo) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if w.all && w.Skip != nil && w.Skip(rel, fi.IsDir()) {
		return nil
	}
	if err := w.fn(dir, name, rel, fi); err != nil || !fi.IsDir() {
		return err
	}
	here, names, err := open(dir, name, fi)
	if err != nil || here == nil {
		return err
	}
	defer here.Close()
	for _, n := range names {
		p := n
		if rel != "." {
			p = rel + "/" + n
		}
		if len(p) > maxPath {
			continue
		}
		fi, err := here.Lstat(n)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := w.visit(here, n, p, fi); err != nil {
			return err
		}
	}
	return nil
}

// open returns the folder that fi is of and the names in it, sorted; nil if it is no
// longer there. Each level is opened from the one above it: by paths, deep folders
// would take the square of their depth.
func open(dir *os.Root, name string, fi fs.FileInfo) (*os.Root, []string, error) {
	f, err := openDir(dir, name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	// A link in its place is followed, within dir: into a circle, perhaps.
	if is, err := f.Stat(); err != nil || !os.SameFile(fi, is) {
		return nil, nil, err
	}
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, nil, err
	}
	slices.Sort(names)
	here, err := rootOf(f)
	return here, names, err
}

// openDir opens a folder and nothing else: os.Root's own ways to do so open
// whatever is there, and wait for ever where the session has put a FIFO.
func openDir(root *os.Root, name string) (*os.File, error) {
	return root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
}

// rootOf is a folder that is open.
func rootOf(dir *os.File) (*os.Root, error) {
	return os.OpenRoot("/proc/self/fd/" + strconv.Itoa(int(dir.Fd())))
}

func notFound(rel string, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%w: %s", ErrNotFound, path.Join(container.StorageDir, rel))
	}
	return err
}

// Write writes a file or folder as a tar archive whose names begin with the last
// part of rel, or with nothing where rel is ".". Sockets and devices are left out.
func (t Tree) Write(ctx context.Context, rel string, w io.Writer) error {
	out := tar.NewWriter(w)
	links := map[[2]uint64]string{}
	base := path.Dir(rel)
	err := t.walk(ctx, rel, func(dir *os.Root, in, p string, fi fs.FileInfo) error {
		name := p
		if base != "." {
			name = strings.TrimPrefix(p, base+"/")
		}
		if name == "." {
			return nil
		}
		return t.writeOne(out, dir, in, name, fi, links)
	})
	if err != nil {
		return err
	}
	return out.Close()
}

// writeOne writes what is called in in dir, under a name.
func (t Tree) writeOne(out *tar.Writer, dir *os.Root, in, name string, fi fs.FileInfo, links map[[2]uint64]string) error {
	target := ""
	var file *os.File
	switch mode := fi.Mode(); {
	case mode.IsRegular():
		f, err := dir.OpenFile(in, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
			return nil // gone, or something else by now
		}
		if err != nil {
			return err
		}
		defer f.Close()
		if fi, err = f.Stat(); err != nil {
			return err
		}
		if !fi.Mode().IsRegular() {
			return nil
		}
		file = f
	case mode&fs.ModeSymlink != 0:
		var err error
		if target, err = dir.Readlink(in); err != nil {
			return nil //nolint:nilerr // gone, or no link by now
		}
	case mode.IsDir(), mode&fs.ModeNamedPipe != 0:
	default:
		return nil
	}
	h, err := tar.FileInfoHeader(fi, target)
	if err != nil {
		return err
	}
	h.Name, h.Format, h.Uname, h.Gname = name, tar.FormatPAX, "", ""
	if fi.IsDir() {
		h.Name += "/"
	}
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	st, ok := fi.Sys().(*unixStat)
	if ok {
		h.Uid, h.Gid = t.inside(st.Uid), t.inside(st.Gid)
		if file != nil && st.Nlink > 1 {
			id := [2]uint64{st.Dev, st.Ino}
			if first, seen := links[id]; seen {
				h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
				return out.WriteHeader(h)
			}
			links[id] = name
		}
	}
	if err := out.WriteHeader(h); err != nil {
		return err
	}
	if file == nil {
		return nil
	}
	// A file that shrinks while it is read is filled up: the header has gone out.
	n, err := io.Copy(out, io.LimitReader(file, h.Size))
	if err != nil {
		return err
	}
	_, err = io.CopyN(out, zeros{}, h.Size-n)
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// inside is an id as the container has it; the machine's own become root's.
func (t Tree) inside(id uint32) int {
	if id < t.IDBase || id >= t.IDBase+runtime.IDMapSize {
		return 0
	}
	return int(id - t.IDBase)
}

func (t Tree) outside(id int) int {
	if id < 0 || id >= runtime.IDMapSize {
		id = 0
	}
	return int(t.IDBase) + id
}
