package fsop

import (
	"context"
	"errors"
	"fmt"
	"path"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Over is a mount on top of a tree.
type Over struct {
	Source string // absolute; "" is an empty read-only tmpfs
	Target string // relative to the tree's root; made if missing
}

type tree struct {
	Source, Target string
	Over           []Over
}

// AttachTree binds source, with all of over on top, to target: in one step, for
// those who look at target and for those it propagates to. What is mounted exactly
// at target is detached before. No path may lead through a symlink: some of the
// folders belong to a container.
func AttachTree(ctx context.Context, source, target string, over []Over) error {
	_, err := run(ctx, request{Op: "tree", Tree: &tree{Source: source, Target: target, Over: over}})
	return err
}

// attach puts the tree together in a mount namespace of its own, where nobody sees
// it half done and nothing is left of it if this process dies; it then takes a
// copy back as one.
func (t *tree) attach() error {
	runtime.LockOSThread() // namespaces are the thread's; the process ends with it
	home, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	fd, err := t.build()
	if err != nil {
		return err
	}
	if err := unix.Setns(home, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("setns: %w", err)
	}
	if err := Detach(t.Target); err != nil {
		return err
	}
	at, err := open(unix.AT_FDCWD, t.Target, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("%s: %w", t.Target, err)
	}
	if err := move(fd, at); err != nil {
		return fmt.Errorf("attaching to %s: %w", t.Target, err)
	}
	return nil
}

// build returns the tree, mounted nowhere.
func (t *tree) build() (int, error) {
	// Sources may lie in the target folder itself, below what is mounted there now,
	// which may be dead. Here nobody misses that.
	if err := Detach(t.Target); err != nil {
		return -1, err
	}
	root, err := clone(t.Source, 0)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", t.Source, err)
	}
	if len(t.Over) == 0 {
		return root, nil
	}
	over := make([]int, len(t.Over))
	for i, o := range t.Over {
		if o.Source == "" {
			over[i], err = emptyFolder()
		} else {
			over[i], err = clone(o.Source, unix.AT_RECURSIVE)
		}
		if err != nil {
			return -1, fmt.Errorf("%s: %w", o.Source, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return -1, fmt.Errorf("%s: %w", t.Source, err)
	}
	// It must be mounted somewhere for others to be mounted on it.
	stage, err := open(unix.AT_FDCWD, t.Target, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", t.Target, err)
	}
	if err := move(root, stage); err != nil {
		return -1, fmt.Errorf("staging: %w", err)
	}
	for i, o := range t.Over {
		at, err := makeFolder(root, o.Target, int(st.Uid), int(st.Gid))
		if err != nil {
			return -1, fmt.Errorf("folder %s of the mount: %w", o.Target, err)
		}
		if err := move(over[i], at); err != nil {
			return -1, fmt.Errorf("mounting over %s: %w", o.Target, err)
		}
	}
	fd, err := unix.OpenTree(root, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return -1, fmt.Errorf("copying the tree: %w", err)
	}
	return fd, nil
}

// clone returns a copy of the mount at a path, mounted nowhere.
func clone(path string, flags uint) (int, error) {
	fd, err := open(unix.AT_FDCWD, path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	return unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|flags)
}

// emptyFolder is a file system in which nothing is and nothing can be made.
func emptyFolder() (int, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	for _, kv := range [][2]string{{"source", "cloudcode-hidden"}, {"size", "4k"}, {"nr_inodes", "2"}, {"mode", "0555"}} {
		if err := unix.FsconfigSetString(fs, kv[0], kv[1]); err != nil {
			return -1, fmt.Errorf("tmpfs %s: %w", kv[0], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC,
		unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
}

func move(from, to int) error {
	return unix.MoveMount(from, "", to, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// open never follows a symlink, in no part of the path.
func open(dir int, path string, flags uint64) (int, error) {
	return unix.Openat2(dir, path, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS})
}

// makeFolder opens a folder below root, and makes what is missing of it.
func makeFolder(root int, rel string, uid, gid int) (int, error) {
	if rel == "" || path.IsAbs(rel) || path.Clean(rel) != rel || rel == "." || rel == ".." || strings.HasPrefix(rel, "../") {
		return -1, fmt.Errorf("%q is no path below the root: %w", rel, unix.EINVAL)
	}
	dir := root
	for name := range strings.SplitSeq(rel, "/") {
		next, err := open(dir, name, unix.O_PATH|unix.O_DIRECTORY)
		if errors.Is(err, unix.ENOENT) {
			if err := unix.Mkdirat(dir, name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
				return -1, err
			}
			// Mounters without owners refuse or ignore this: all is its owner's there.
			_ = unix.Fchownat(dir, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
			next, err = open(dir, name, unix.O_PATH|unix.O_DIRECTORY)
		}
		if err != nil {
			return -1, err
		}
		dir = next // the process ends soon: nothing here is closed
	}
	return dir, nil
}
