package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/container"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/nodeagent/archive"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

const (
	attachTimeout  = 30 * time.Second
	abandonTimeout = 10 * time.Second
	flushTimeout   = time.Minute // of one try to write what is left at the end
	mountAgain     = time.Minute // after a mount that failed, of a session that runs without it
	// seedTimeout bounds the copy of OpenCode's data out of a bucket that the original
	// project wrote.
	seedTimeout = 10 * time.Minute
)

func (s *Session) mountMode() bool {
	return s.a.GetStorage().GetMode() == cloudcodev1.Storage_MOUNT
}

// id of the session's mount: also unique among sessions that had the same name.
func mountID(v volume.Volume) string { return v.Session }

func (s *Session) mountSpec() mount.Spec {
	st, v := s.a.GetStorage(), s.p.Volume
	args := ""
	if s.mounter.Name() == "tigrisfs" {
		args = st.GetTigrisfsArgs()
	}
	return mount.Spec{
		ID: mountID(v), Point: v.MountDir,
		Endpoint: st.GetEndpoint(), Bucket: st.GetBucket(), AccessKeyID: st.GetAccessKeyId(), SecretAccessKey: st.GetSecretAccessKey(),
		Region: st.GetRegion(), PathStyle: st.GetPathStyle(), Prefix: storage.Join(st.GetRoot(), st.GetPrefix()),
		Args: args, UID: v.IDBase, GID: v.IDBase, LogPath: filepath.Join(v.StateDir, "mounter.log"),
		CacheDir: filepath.Join(filepath.Dir(v.S3Dir), "mountcache"), PublicOnly: st.GetPublicOnly(),
	}
}

// mountBucket mounts the session's folder of the bucket and has it looked after.
// In SNAPSHOT mode it is an extra: what is wrong with it is said, and the session runs.
func (s *Session) mountBucket(ctx context.Context) error {
	err := s.pickMounter(ctx)
	switch {
	case s.p.Ending && errors.Is(err, ErrNoMounter):
		return nil // then nothing is mounted
	case errors.Is(err, ErrNoMounter) && !s.mountMode():
		s.say("there is no /root/s3/" + BucketDir + ": neither TigrisFS nor rclone is installed on the node; checkpoints do not need it")
		return nil
	case err != nil:
		return err
	case s.p.Ending:
		return nil
	}
	if s.a.GetStorage().GetPublicOnly() && !s.mountMode() {
		// A mounter asks for the address itself, later, and may get another one.
		err := s.m.Drop(ctx, s.p.Volume) // what is left from before
		s.mounter = nil
		s.say("there is no /root/s3/" + BucketDir + ": the server mounts no buckets of sessions' own (--own-storage any allows it); checkpoints do not need it")
		return err
	}
	if own, err := s.ownFolder(); err != nil {
		return err
	} else if own {
		s.mounter = nil
		s.say("the session has files of its own in /root/s3/" + BucketDir + ", so the bucket is not shown there: move them, then suspend and resume the session")
		return nil
	}
	if s.mountMode() && s.mounter.Name() != "tigrisfs" {
		s.say("the workspace is mounted with " + s.mounter.Name() + ", where symbolic links, file modes and git do not work: install TigrisFS on the node, or use mode SNAPSHOT")
	}
	s.p.Progress("mount", "mounting the bucket with "+s.mounter.Name(), 0, 0)
	s.setStatus(func(st *cloudcodev1.StorageStatus) { st.Mounter = s.mounter.Name() })
	s.supervisor = &mount.Supervisor{
		Mounter: s.mounter, Spec: s.mountSpec(), Log: s.log, Remounted: s.Attach, Resume: s.resumed,
		Own: func(ctx context.Context) error { return s.repo.Verify(ctx, s.owner) },
		OnChange: func(state mount.State, message string) {
			s.mountChanged(map[mount.State]cloudcodev1.StorageStatus_MountState{
				mount.Mounted: cloudcodev1.StorageStatus_MOUNTED, mount.Remounting: cloudcodev1.StorageStatus_REMOUNTING,
				mount.Failed: cloudcodev1.StorageStatus_MOUNT_FAILED,
			}[state], message)
		},
	}
	err = s.supervisor.Start(ctx)
	switch {
	case s.mountMode() && err == nil:
		err = s.seed(ctx)
	case !s.mountMode() && err != nil:
		s.mountChanged(cloudcodev1.StorageStatus_MOUNT_FAILED, err.Error())
		s.mountLater(ctx)
		err = nil
	}
	if err != nil {
		s.stopSupervising()
	}
	return err
}

// say sets what there is to be said of the session's storage while nothing is wrong.
func (s *Session) say(note string) {
	s.setStatus(func(st *cloudcodev1.StorageStatus) { s.note, st.Message = note, note })
}

// pickMounter takes the one that has the session's mount, or else the first that is
// installed. Returns ErrNoMounter.
func (s *Session) pickMounter(ctx context.Context) error {
	missing := []error{ErrNoMounter}
	for _, m := range s.m.cfg.Mounters {
		mounts, err := m.List(ctx)
		if err != nil {
			return err
		}
		for _, i := range mounts {
			if i.ID == mountID(s.p.Volume) {
				s.mounter = m
				return nil
			}
		}
	}
	for _, m := range s.m.cfg.Mounters {
		_, err := m.Version(ctx)
		if err == nil {
			s.mounter = m
			return nil
		}
		missing = append(missing, err)
	}
	return errors.Join(missing...)
}

// ownFolder says whether the session has put files of its own where SNAPSHOT mode
// shows the bucket: in a time without a mounter, or before a checkpoint was restored.
func (s *Session) ownFolder() (bool, error) {
	point := filepath.Join(s.p.Volume.S3Dir, BucketDir)
	if s.mountMode() || mount.CheckBare(point) != nil {
		return false, nil
	}
	fi, err := os.Lstat(point)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil || !fi.IsDir() {
		return true, err
	}
	tree, err := os.OpenRoot(s.p.Volume.S3Dir) // it may be a link by now
	if err != nil {
		return false, err
	}
	defer tree.Close()
	entries, err := fs.ReadDir(tree.FS(), BucketDir)
	return len(entries) > 0, err
}

// mountLater tries until the bucket is mounted, for a session that runs without it.
func (s *Session) mountLater(ctx context.Context) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancelLater = cancel
	s.later.Go(func() {
		for {
			select {
			case <-time.After(mountAgain):
			case <-ctx.Done():
				return
			}
			err := s.supervisor.Start(ctx)
			if err == nil {
				err = s.Attach(ctx)
			}
			if err == nil || ctx.Err() != nil {
				return
			}
			s.mountChanged(cloudcodev1.StorageStatus_MOUNT_FAILED, err.Error())
		}
	})
}

// stopSupervising leaves the mount as it is.
func (s *Session) stopSupervising() {
	s.stopLater()
	if s.supervisor != nil {
		s.supervisor.Stop()
	}
}

func (s *Session) stopLater() {
	if s.cancelLater != nil {
		s.cancelLater()
		s.later.Wait()
	}
}

// mountChanged puts the state of the mount into the status. That changes cannot be
// saved is the more important message.
func (s *Session) mountChanged(state cloudcodev1.StorageStatus_MountState, message string) {
	s.setStatus(func(st *cloudcodev1.StorageStatus) {
		st.MountState = state
		if st.GetUnsavedSince() == nil {
			st.Message = cmp.Or(message, s.note)
		}
	})
}

// seed brings OpenCode's data out of a bucket that the original project wrote,
// where it lay on the mount.
func (s *Session) seed(ctx context.Context) error {
	v := s.p.Volume
	done := filepath.Join(v.StateDir, "seeded")
	if _, err := os.Stat(done); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tree, err := os.OpenRoot(v.S3Dir)
	if err != nil {
		return err
	}
	defer tree.Close()
	begun := filepath.Join(v.StateDir, "seeding")
	if _, err := os.Stat(begun); errors.Is(err, fs.ErrNotExist) {
		for _, dir := range localDirs {
			entries, err := fs.ReadDir(tree.FS(), dir)
			if err != nil {
				return err
			}
			if len(entries) > 0 { // from a checkpoint
				return os.WriteFile(done, nil, 0o600)
			}
		}
		if err := os.WriteFile(begun, nil, 0o600); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, seedTimeout)
	defer cancel()
	for _, dir := range localDirs {
		// What is there is half of an earlier try.
		if err := tree.RemoveAll(dir); err != nil {
			return err
		}
		if err := makeOwned(tree, dir, v.IDBase); err != nil {
			return err
		}
		if err := copyTree(ctx, v, tree, dir); err != nil {
			return fmt.Errorf("copying %s out of the bucket: %w", dir, err)
		}
	}
	if err := os.WriteFile(done, nil, 0o600); err != nil {
		return err
	}
	return os.Remove(begun)
}

// copyTree copies a folder of the mount to the local tree.
func copyTree(ctx context.Context, v volume.Volume, to *os.Root, dir string) error {
	from, err := os.OpenRoot(v.MountDir)
	if err != nil {
		return err
	}
	defer from.Close()
	err = archive.Copy(ctx, archive.Tree{Root: from, IDBase: v.IDBase}, archive.Tree{Root: to, IDBase: v.IDBase}, dir)
	if errors.Is(err, archive.ErrNotFound) {
		return nil
	}
	return err
}

// Mounts of the session's container.
func (s *Session) Mounts() []runtime.Mount {
	source := s.p.Volume.S3Dir
	if s.mountMode() {
		source = s.p.Volume.RootDir
	}
	return []runtime.Mount{{Source: source, Destination: container.StorageDir, Propagated: true}}
}

// point is where the container sees the bucket, on the host; empty if it does not.
func (s *Session) point() string {
	switch v := s.p.Volume; {
	case s.mounter == nil:
		return ""
	case s.mountMode():
		return v.RootDir
	default:
		return filepath.Join(v.S3Dir, BucketDir)
	}
}

// Detach makes the container's folder bare: for runtime.Hooks.Creating. A
// container that is made while the bucket is mounted there would have that very
// mount for good.
func (s *Session) Detach(context.Context) error {
	if s.mountMode() {
		// Nothing is ever written here: what is seen while nothing is mounted.
		if err := os.Mkdir(s.p.Volume.RootDir, 0o555); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if s.point() == "" {
		return nil
	}
	return mount.Detach(s.point())
}

// Attach shows the container the bucket: for runtime.Hooks.Created, and after a
// remount.
func (s *Session) Attach(ctx context.Context) error {
	if s.point() == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	v := s.p.Volume
	var over []mount.Bind
	if s.mountMode() {
		for _, dir := range localDirs {
			over = append(over, mount.Bind{Source: filepath.Join(v.S3Dir, dir), Target: dir})
		}
	} else if err := os.Mkdir(s.point(), 0o555); err != nil && !errors.Is(err, fs.ErrExist) {
		return err // the machine's own and not to be written to: that would not be in the bucket
	}
	if s.a.GetStorage().GetPrefix() == "" {
		// Checkpoints of all sessions lie in this one's folder: not for its eyes.
		over = append(over, mount.Bind{Target: storage.StateDir})
	}
	err := mount.AttachTree(ctx, v.MountDir, s.point(), over)
	if err != nil && !s.mountMode() {
		s.mountChanged(cloudcodev1.StorageStatus_MOUNT_FAILED, err.Error())
		return nil
	}
	return err
}

func (s *Session) unmountBucket(ctx context.Context) error {
	s.stopSupervising()
	if s.mounter == nil {
		return nil
	}
	if err := mount.Detach(s.point()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	id := mountID(s.p.Volume)
	err := s.mounter.Unmount(ctx, id)
	if removals, ok := errors.AsType[*mount.RemovalsLeftError](err); ok {
		return s.finishRemovals(ctx, removals.Names)
	}
	if !errors.Is(err, mount.ErrDead) && !errors.Is(err, mount.ErrHung) && !errors.Is(err, mount.ErrDetached) {
		return err
	}
	// Trying again would say the same for ever: nobody mends mounts of a session that
	// ends. A mounter that keeps files on disk has another one write them.
	if r, ok := s.mounter.(mount.Remounter); ok {
		if err := r.Remount(ctx, s.mountSpec()); err != nil {
			return err
		}
		return s.mounter.Unmount(ctx, id)
	}
	s.log.Warn("files in the bucket may be missing", "error", err)
	s.setStatus(func(st *cloudcodev1.StorageStatus) {
		st.Message = "files that were just being written to the bucket may be missing: " + err.Error()
	})
	return s.mounter.Abandon(ctx, id)
}

// finishRemovals ends a mount of which all is written but some removals, and
// removes what is there of those.
func (s *Session) finishRemovals(ctx context.Context, names []string) error {
	if err := s.mounter.Abandon(ctx, mountID(s.p.Volume)); err != nil {
		return err
	}
	var left []string
	for _, name := range names {
		key := storage.Join(s.a.GetStorage().GetPrefix(), strings.TrimPrefix(name, "/"))
		_, err := s.store.Stat(ctx, key)
		if errors.Is(err, objstore.ErrNotFound) {
			continue // it never was an object
		}
		if err != nil {
			return err
		}
		if err := s.store.Delete(ctx, key); err != nil {
			return err
		}
		left = append(left, name)
	}
	if len(left) > 0 {
		s.log.Warn("the mounter had not removed these from the bucket: removed now", "names", left)
		s.say(fmt.Sprintf("TigrisFS had not removed %d files that were deleted or renamed, such as %q: they are removed now; look at what was changed last in their folders", len(left), left[0]))
	}
	return nil
}

func (s *Session) abandonBucket(ctx context.Context) error {
	if s.mounter == nil {
		return nil
	}
	s.stopLater()
	// The mounter first: it writes once more when it is unmounted.
	abandon := func(ctx context.Context) error { return s.mounter.Abandon(ctx, mountID(s.p.Volume)) }
	if s.supervisor != nil {
		abandon = s.supervisor.Abandon
	}
	return errors.Join(abandon(ctx), mount.Detach(s.point()))
}

// Drop ends the mount of a volume whose session is no longer this node's, without
// writing anything.
func (m *Manager) Drop(ctx context.Context, v volume.Volume) error {
	ctx, cancel := context.WithTimeout(ctx, abandonTimeout)
	defer cancel()
	var errs []error
	for _, mounter := range m.cfg.Mounters {
		errs = append(errs, mounter.Abandon(ctx, mountID(v)))
	}
	return errors.Join(append(errs, Detach(v))...)
}

// Detach takes a volume's bucket away from where containers see it.
func Detach(v volume.Volume) error {
	return errors.Join(mount.Detach(v.RootDir), mount.Detach(filepath.Join(v.S3Dir, BucketDir)))
}

// DropSession ends the mounts of a session of which only its id is known.
func (m *Manager) DropSession(ctx context.Context, session string) error {
	return m.DropOthers(ctx, func(volume string) bool {
		i := strings.LastIndexByte(volume, '-')
		return i < 0 || volume[:i] != session
	})
}

// DropOthers ends the mounts of volumes that keep does not know: their sessions
// went elsewhere while this daemon was away.
func (m *Manager) DropOthers(ctx context.Context, keep func(volume string) bool) error {
	var errs []error
	for _, mounter := range m.cfg.Mounters {
		mounts, err := mounter.List(ctx)
		errs = append(errs, err)
		for _, i := range mounts {
			if !keep(i.ID) {
				errs = append(errs, mounter.Abandon(ctx, i.ID))
			}
		}
	}
	return errors.Join(errs...)
}
