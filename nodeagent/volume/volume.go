// Package volume keeps a session's files on the node: the workspace, and what
// its container writes elsewhere.
//
// Under Manager.Dir, which is its own mount with nosuid and nodev, each session
// has
//
//	<session>/meta.json      the id base, never given to another session meanwhile
//	<session>/disk.img       with a disk limit: a sparse ext4 file system …
//	<session>/data/          … mounted here; without one a plain folder
//	<session>/data/s3/       the workspace, owned by the id base
//	<session>/data/scratch/  the container's writable layer
//
// nosuid matters: the container's root may make setuid files, and they belong
// to real ids of this machine.
package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// Error classes, those of the container runtime.
var (
	// ErrInvalid: asking again cannot help.
	ErrInvalid = runtime.ErrInvalidSpec
	// ErrNoSpace: this machine's disk is full.
	ErrNoSpace = runtime.ErrNoSpace
)

const (
	firstIDBase = 0x10000000
	lastIDBase  = 0xffff0000 - runtime.IDMapSize
	// MinDiskBytes is the smallest disk limit: less leaves no room for anything
	// beside the file system's own tables.
	MinDiskBytes = 32 << 20

	metaFile = "meta.json"
	diskFile = "disk.img"
	// removing marks folders that are being deleted.
	removing = ".removing-"
)

// Manager gives out volumes below Dir. One process per Dir.
type Manager struct {
	// Dir is an absolute folder, made with mode 0700.
	Dir string

	mu sync.Mutex // held by every call: they are rare and short
}

// Volume of one session. All paths are absolute.
type Volume struct {
	Session string
	Dir     string
	// IDBase is the first of the 65536 host ids of the session's container.
	IDBase uint32
	// S3Dir becomes /root/s3; it is owned by IDBase.
	S3Dir string
	// ScratchDir is for runtime.Spec.ScratchDir.
	ScratchDir string
	// MountDir and RootDir are mount points for the session's bucket, outside of its
	// disk: of the mounter, and of what the container sees at /root/s3 where that is
	// the bucket. StateDir keeps what the node knows of the session's checkpoints.
	// Whoever uses them makes them.
	MountDir, RootDir, StateDir string
	// DiskBytes is the limit of S3Dir and ScratchDir together, 0 for none.
	DiskBytes int64
}

type meta struct {
	IDBase    uint32 `json:"id_base"`
	DiskBytes int64  `json:"disk_bytes"`
}

// Ensure makes or opens the session's volume and mounts it. It is idempotent.
// A larger diskBytes than before grows it in place, under a running container
// too; a smaller one, or one for a volume made without, is ErrInvalid.
// diskBytes 0 means no limit for a new volume and the present one for another.
func (m *Manager) Ensure(ctx context.Context, session string, diskBytes int64) (Volume, error) {
	if !runtime.ValidSession(session) {
		return Volume{}, fmt.Errorf("%w: session %q", ErrInvalid, session)
	}
	if diskBytes < 0 || diskBytes > 0 && diskBytes < MinDiskBytes {
		return Volume{}, fmt.Errorf("%w: a disk limit of %d bytes is below the smallest, %d MiB", ErrInvalid, diskBytes, MinDiskBytes>>20)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	v, err := m.ensure(ctx, session, diskBytes)
	if err != nil {
		return Volume{}, classify(fmt.Errorf("volume of session %s: %w", session, err))
	}
	return v, nil
}

func (m *Manager) ensure(ctx context.Context, session string, diskBytes int64) (Volume, error) {
	if err := m.prepare(); err != nil {
		return Volume{}, err
	}
	md, err := m.load(session)
	if errors.Is(err, fs.ErrNotExist) {
		md, err = m.create(ctx, session, diskBytes)
	}
	if err != nil {
		return Volume{}, err
	}
	switch {
	case diskBytes == 0 || diskBytes == md.DiskBytes:
	case md.DiskBytes == 0:
		return Volume{}, fmt.Errorf("%w: it was made without a disk limit and cannot get one", ErrInvalid)
	case diskBytes < md.DiskBytes:
		return Volume{}, fmt.Errorf("%w: a disk limit cannot shrink (from %d to %d bytes)", ErrInvalid, md.DiskBytes, diskBytes)
	}
	v := m.volume(session, md)
	if err := os.MkdirAll(v.data(), 0o700); err != nil {
		return Volume{}, err
	}
	if md.DiskBytes > 0 {
		if err := mountDisk(ctx, v.disk(), v.data()); err != nil {
			return Volume{}, err
		}
		if diskBytes > md.DiskBytes {
			if err := growDisk(ctx, v.disk(), v.data(), diskBytes); err != nil {
				return Volume{}, err
			}
			md.DiskBytes = diskBytes
			if err := m.save(session, md); err != nil {
				return Volume{}, err
			}
			v.DiskBytes = diskBytes
		}
	}
	return v, v.makeFolders()
}

func (v Volume) data() string { return filepath.Join(v.Dir, "data") }
func (v Volume) disk() string { return filepath.Join(v.Dir, diskFile) }

func (v Volume) makeFolders() error {
	for dir, mode := range map[string]os.FileMode{v.S3Dir: 0o755, v.ScratchDir: 0o700} {
		err := os.Mkdir(dir, mode)
		if errors.Is(err, fs.ErrExist) {
			if dir == v.ScratchDir {
				continue
			}
			// One that is still the machine's root's was left by a crash between
			// the steps below: the container could not write to it.
			var st unix.Stat_t
			if err = unix.Lstat(dir, &st); err == nil && st.Uid != 0 {
				continue
			}
		}
		if err == nil {
			err = os.Chmod(dir, mode) // whatever the umask
		}
		if err == nil && dir == v.S3Dir {
			err = os.Lchown(dir, int(v.IDBase), int(v.IDBase))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *Manager) volume(session string, md meta) Volume {
	dir := filepath.Join(m.Dir, session)
	return Volume{
		Session: session, Dir: dir, IDBase: md.IDBase, DiskBytes: md.DiskBytes,
		S3Dir: filepath.Join(dir, "data", "s3"), ScratchDir: filepath.Join(dir, "data", "scratch"),
		MountDir: filepath.Join(dir, "mnt"), RootDir: filepath.Join(dir, "root"), StateDir: filepath.Join(dir, "state"),
	}
}

// create chooses ids and makes the file system. meta.json comes last: a folder
// without one is half-made and made again.
func (m *Manager) create(ctx context.Context, session string, diskBytes int64) (md meta, err error) {
	base, err := m.freeIDBase()
	if err != nil {
		return meta{}, err
	}
	dir := filepath.Join(m.Dir, session)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return meta{}, err
	}
	defer func() {
		if err != nil {
			_ = mount.RemoveAll(dir)
		}
	}()
	if diskBytes > 0 {
		if err := makeDisk(ctx, filepath.Join(dir, diskFile), diskBytes); err != nil {
			return meta{}, err
		}
	}
	md = meta{IDBase: base, DiskBytes: diskBytes}
	return md, m.save(session, md)
}

// freeIDBase returns the lowest range that no folder has, those on their way
// out included: their files still carry it.
func (m *Manager) freeIDBase() (uint32, error) {
	entries, err := os.ReadDir(m.Dir)
	if err != nil {
		return 0, err
	}
	used := map[uint32]bool{}
	for _, e := range entries {
		md, err := m.load(e.Name())
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			// Not knowing what it has, any choice could be the same.
			return 0, err
		}
		used[md.IDBase] = true
	}
	for base := uint32(firstIDBase); base <= lastIDBase; base += runtime.IDMapSize {
		if !used[base] {
			return base, nil
		}
	}
	return 0, errors.New("no free range of user ids")
}

func (m *Manager) load(name string) (meta, error) {
	data, err := os.ReadFile(filepath.Join(m.Dir, name, metaFile))
	if errors.Is(err, unix.ENOTDIR) {
		return meta{}, fs.ErrNotExist
	}
	if err != nil {
		return meta{}, err
	}
	var md meta
	if err := json.Unmarshal(data, &md); err != nil {
		return meta{}, fmt.Errorf("%s is damaged: %w", filepath.Join(m.Dir, name, metaFile), err)
	}
	if md.IDBase < firstIDBase {
		return meta{}, fmt.Errorf("%s is damaged: id base %d", filepath.Join(m.Dir, name, metaFile), md.IDBase)
	}
	return md, nil
}

// save leaves the old or the new file after a crash.
func (m *Manager) save(session string, md meta) error {
	data, err := json.Marshal(md)
	if err != nil {
		return err
	}
	if err := atomicfile.Write(filepath.Join(m.Dir, session, metaFile), data, 0o600); err != nil {
		return err
	}
	return atomicfile.SyncDir(m.Dir)
}

// Unmount detaches the session's volume from the machine; the data stays. It
// is idempotent, and an error while something still uses it.
func (m *Manager) Unmount(ctx context.Context, session string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unmount(ctx, session)
}

func (m *Manager) unmount(ctx context.Context, session string) error {
	if !runtime.ValidSession(session) {
		return fmt.Errorf("%w: session %q", ErrInvalid, session)
	}
	v := m.volume(session, meta{})
	if err := unmountDisk(ctx, v.disk(), v.data()); err != nil {
		return fmt.Errorf("volume of session %s: %w", session, err)
	}
	return nil
}

// Remove unmounts and deletes the session's volume. What does not exist is no
// error. What it leaves behind when it fails, or the process ends in between, the next
// Remove of any session tries again: it reports only the trouble with its own.
func (m *Manager) Remove(ctx context.Context, session string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.unmount(ctx, session); err != nil {
		return err
	}
	if err := mount.CheckBare(filepath.Join(m.Dir, session)); err != nil {
		return err
	}
	aside := filepath.Join(m.Dir, removing+session)
	// The rename is what makes it gone, also when deleting takes long.
	err := os.Rename(filepath.Join(m.Dir, session), aside)
	if errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTEMPTY) {
		if err = deleteTree(aside); err == nil {
			err = os.Rename(filepath.Join(m.Dir, session), aside)
		}
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = deleteTree(aside)
	}
	m.sweep(aside)
	if err != nil {
		return fmt.Errorf("deleting the removed volume of session %s: %w", session, err)
	}
	return nil
}

// sweep deletes what other calls of Remove have put aside. One that cannot be deleted
// is in nobody's way: its session's own Remove says why.
func (m *Manager) sweep(but string) {
	left, _ := filepath.Glob(filepath.Join(m.Dir, removing+"*"))
	for _, dir := range left {
		if dir != but {
			_ = deleteTree(dir)
		}
	}
}

// deleteTree keeps meta.json, which reserves the ids, for last.
func deleteTree(dir string) error {
	for _, part := range []string{"data", diskFile} {
		if err := mount.RemoveAll(filepath.Join(dir, part)); err != nil {
			return err
		}
	}
	return mount.RemoveAll(dir)
}

// Exists says whether the session has a volume.
func (m *Manager) Exists(session string) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, err := m.load(session)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// List returns all volumes, mounted or not, in order of their session's id.
func (m *Manager) List(context.Context) ([]Volume, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.list()
}

func (m *Manager) list() ([]Volume, error) {
	entries, err := os.ReadDir(m.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var out []Volume
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		md, err := m.load(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		out = append(out, m.volume(e.Name(), md))
	}
	return out, nil
}

// UnmountAll detaches every volume and Dir itself: what `cloudcode up` does at
// its end. The data stays.
func (m *Manager) UnmountAll(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	list, err := m.list()
	if err != nil {
		return err
	}
	var errs []error
	for _, v := range list {
		errs = append(errs, m.unmount(ctx, v.Session))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return unmountPoint(m.Dir)
}

func classify(err error) error {
	if !errors.Is(err, ErrNoSpace) && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || strings.Contains(err.Error(), "No space left on device")) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}
