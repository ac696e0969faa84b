// Package checkpoint keeps sessions of this node in object storage: it takes them
// over, brings their files here, mounts their buckets, saves them while they run,
// and lets go of them when another node has taken over.
//
// On the node a session's volume has
//
//	data/s3/    the local tree: what checkpoints hold. In SNAPSHOT mode it is
//	            /root/s3; in MOUNT mode OpenCode's data alone
//	mnt/        the bucket's folder, by the mounter
//	root/       MOUNT mode: what the container has as /root/s3. mnt/ is bound
//	            here, and OpenCode's data over it
//	state/      of which generation the local tree is, and what the writer of
//	            checkpoints remembers
package checkpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// Errors of this package; those of the object store and of checkpoints pass through.
var (
	// ErrFenced: another node has taken the session over.
	ErrFenced = checkpoint.ErrFenced
	// ErrNoMounter: the session's mode needs a mounter, and none is installed.
	ErrNoMounter = errors.New("no mounter is installed on this node")
)

// Triggers of a checkpoint, as the API names them.
const (
	TriggerTurn    = "turn"
	TriggerBusy    = "busy"
	TriggerChange  = "change"
	TriggerSuspend = "suspend"
	TriggerStop    = "stop"
	TriggerManual  = "manual"
	TriggerRestore = "restore"
)

// TypeCheckpointed is the type of the event in a session's ring that says that
// all before it is saved. Its frame is a cloudcode.v1.Checkpoint in JSON.
const TypeCheckpointed = "cloudcode.checkpointed"

// BucketDir is where SNAPSHOT mode shows the bucket, below /root/s3.
const BucketDir = "bucket"

// Folders of OpenCode that are local in MOUNT mode: its database and state do not
// survive on a bucket.
var localDirs = []string{".opencode/data", ".opencode/state"}

// takeoverWait is how long a new owner in MOUNT mode waits before it mounts, when
// the one before has not let go: that one looks at the mark every checkInterval,
// and stops writing.
const (
	checkInterval = 5 * time.Second
	takeoverWait  = 2*checkInterval + 5*time.Second
)

// Config of a Manager.
type Config struct {
	Node     string
	Instance string // random, as old as the node's data
	Mounters []mount.Mounter
	// OpenStore opens the bucket; the caller closes it if it can be.
	OpenStore func(storage.Config) (objstore.Store, error)
	Log       *slog.Logger
}

// Manager opens sessions. It has no state of its own.
type Manager struct{ cfg Config }

// New returns a Manager.
func New(cfg Config) *Manager { return &Manager{cfg: cfg} }

// Params of Open.
type Params struct {
	Assignment *nodev1.Assignment // with storage
	Volume     volume.Volume
	// Adopt says that the session's container runs, and that this node had the
	// session until now: then an object store that is away does not end it.
	Adopt bool
	// Ending says that the session is only to be finished: nothing is mounted for it.
	Ending bool
	// Stop ends the session's container if there is one: called before its files
	// are replaced.
	Stop func(context.Context) error
	// Freeze freezes the container and returns what thaws it. Without a running
	// container both do nothing.
	Freeze func(context.Context) (thaw func() error, err error)
	// Labels of the session as they are now.
	Labels func() map[string]string
	// Changed is told that Status has something new, and whether that is more than the
	// next checkpoint; it must not block.
	Changed func(urgent bool)
	// Checkpointed is told of a checkpoint after a chat's turn.
	Checkpointed func(*cloudcodev1.Checkpoint)
	// Progress of Open.
	Progress func(phase, detail string, current, total int64)
}

// mark says of which owner the local tree is. It is written before the head is
// taken and again once the tree is as the head says, so that after a crash in
// between it is known whether the local tree or the head is newer.
type mark struct {
	UID       string `json:"uid"`
	Instance  string `json:"instance"`
	Acquired  uint64 `json:"acquired"`            // generation; 0: the tree is not whole
	Acquiring uint64 `json:"acquiring"`           // generation that was on its way
	Restoring string `json:"restoring,omitempty"` // restore that has begun to replace the tree
}

const markFile = "owner.json"

func loadMark(dir string) (mark, error) {
	var m mark
	data, err := os.ReadFile(filepath.Join(dir, markFile))
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return m, err
	}
	if json.Unmarshal(data, &m) != nil {
		return mark{}, nil // then the head decides, as on another node
	}
	return m, nil
}

func (m mark) save(dir string) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, markFile), data, 0o600)
}

// Session is one session in object storage, on this node. Open makes it; Run
// saves it for as long as its container runs.
type Session struct {
	m       *Manager
	p       Params
	a       *nodev1.Assignment
	owner   checkpoint.Owner
	store   objstore.Store
	repo    *checkpoint.Session
	mounter mount.Mounter // nil: nothing is mounted
	// supervisor looks after the mount; nil if nothing is mounted. later is what mounts
	// when that has failed at first.
	supervisor  *mount.Supervisor
	resumed     bool // nobody else has written to the bucket since this node mounted it last
	later       sync.WaitGroup
	cancelLater context.CancelFunc
	log         *slog.Logger

	// acquired: the head says that the session is this owner's.
	acquired atomic.Bool
	requests chan request
	ended    chan struct{} // closed when Run has returned
	activity activity

	mu      sync.Mutex
	status  *cloudcodev1.StorageStatus
	note    string // the message while nothing is wrong
	version string // of OpenCode

	// Used by Open, then by Run's loop, and by Finish after it.
	away     error // why it does not yet
	writer   *checkpoint.Writer
	look     time.Duration // that it took to find that nothing has changed
	restored string        // to be noted in the head; empty: what is there stays
}

type request struct {
	trigger string
	done    chan result
}

type result struct {
	info checkpoint.Info
	err  error
}

// Open takes the session over for the assignment's generation, brings its files
// here if they are not, and mounts its bucket. Where this daemon or the one before
// has done so for this generation already, it needs no object store: a session
// outlives an outage of that. Returns ErrFenced, ErrNoMounter, and classes of
// packages objstore, checkpoint and mount.
func (m *Manager) Open(ctx context.Context, p Params) (_ *Session, err error) {
	a := p.Assignment
	cfg := StorageConfig(a.GetStorage())
	s := &Session{
		m: m, p: p, a: a, log: m.cfg.Log.With("session", a.GetSessionId()),
		owner: checkpoint.Owner{
			SessionID: a.GetSessionId(), SessionUID: a.GetSessionUid(),
			Node: m.cfg.Node, Instance: m.cfg.Instance, Generation: uint64(a.GetGeneration()),
		},
		requests: make(chan request), ended: make(chan struct{}),
		status: &cloudcodev1.StorageStatus{Mode: a.GetStorage().GetMode(), Persistent: true, Uri: cfg.URI(a.GetStorage().GetPrefix())},
	}
	if s.store, err = m.cfg.OpenStore(cfg); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.closeWriter()
			s.closeStore()
		}
	}()
	repo, err := checkpoint.Open(s.store, "", cfg.EncryptionKey) // the store's keys are below the root
	if err != nil {
		return nil, err
	}
	s.repo = repo.Session(a.GetStorage().GetPrefix())
	if err := os.MkdirAll(p.Volume.StateDir, 0o700); err != nil {
		return nil, err
	}
	if err := s.takeOver(ctx); err != nil {
		return nil, err
	}
	if err := s.mountBucket(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// StorageConfig of an assignment's storage.
func StorageConfig(st *nodev1.AssignedStorage) storage.Config {
	return storage.Config{
		Endpoint: st.GetEndpoint(), Bucket: st.GetBucket(), AccessKeyID: st.GetAccessKeyId(), SecretAccessKey: st.GetSecretAccessKey(),
		Region: st.GetRegion(), PathStyle: st.GetPathStyle(), Root: st.GetRoot(), TigrisFSArgs: st.GetTigrisfsArgs(), EncryptionKey: st.GetEncryptionKey(),
		Own: st.GetOwn(), PublicOnly: st.GetPublicOnly(),
	}
}

// record is the session as its manifests keep it: enough to create it
// anew, without keys.
func (s *Session) record() ([]byte, error) {
	a := s.a
	spec := proto.CloneOf(a.GetSpec())
	if s3 := spec.GetStorage().GetS3(); s3 != nil {
		s3.AccessKeyId, s3.SecretAccessKey = "", ""
	}
	return protojson.Marshal(&cloudcodev1.Session{
		Name: "sessions/" + a.GetSessionId(), Uid: a.GetSessionUid(), Labels: s.p.Labels(), Spec: spec,
	})
}

// takeOver makes this node the session's owner and the local tree what the newest
// checkpoint, or this node's own newer work, says.
func (s *Session) takeOver(ctx context.Context) error {
	dir := s.p.Volume.StateDir
	was, err := loadMark(dir)
	if err != nil {
		return err
	}
	ours := was.UID == s.owner.SessionUID && was.Instance == s.owner.Instance
	if ours && was.Acquired == s.owner.Generation {
		return s.stillOurs(ctx)
	}
	look, err := s.repo.Head(ctx)
	existed := !errors.Is(err, checkpoint.ErrNotFound)
	if existed && err != nil {
		if errors.Is(err, objstore.ErrUnavailable) && s.p.Adopt && ours && was.Acquired != 0 && s.a.GetRestoreCheckpoint() == "" {
			s.log.Warn("the object store is away: the session goes on, and is taken over for its new generation later", "error", err)
			s.away = err
			return nil
		}
		return err
	}
	// What the mark says must hold whenever this process dies: before the head is
	// taken, it says of a tree that is not the newest that it is not.
	next := mark{UID: s.owner.SessionUID, Instance: s.owner.Instance, Acquiring: s.owner.Generation}
	newest := ours && s.newest(was, look, existed)
	if newest {
		next.Acquired, next.Restoring = was.Acquired, was.Restoring
		if existed {
			next.Acquired = look.Owner.Generation
		}
	}
	if err := next.save(dir); err != nil {
		return err
	}
	// From here on only what the head was when it was taken counts: the owner before
	// may have moved it once more.
	head, existed, err := s.repo.Acquire(ctx, s.owner)
	if err != nil {
		return err
	}
	s.acquired.Store(true)
	newest = newest && s.newest(next, head, existed)
	s.resumed = newest && existed
	if !existed { // what was sent once may be gone with the head
		if err := os.RemoveAll(s.writerState()); err != nil {
			return err
		}
	}
	if !newest {
		next.Acquired, next.Restoring = 0, ""
		if err := next.save(dir); err != nil {
			return err
		}
		if err := s.bring(ctx, head, existed); err != nil {
			return err
		}
		if s.due(head) { // there is nothing here that the restore would have to save
			next.Restoring = s.wanted()
		}
	}
	if err := s.restore(ctx, head, &next); err != nil {
		return err
	}
	next.Acquired, next.Acquiring, next.Restoring = s.owner.Generation, 0, ""
	return next.save(dir)
}

// newest says whether the local tree has all that the head's owner has ever had.
func (s *Session) newest(m mark, head checkpoint.Head, existed bool) bool {
	switch {
	case m.Acquired == 0:
		return false
	case !existed:
		return true // somebody has emptied the bucket: there is no other copy
	case m.Restoring != "" && (m.Restoring != s.wanted() || !s.due(head)):
		return false // half replaced, for a restore that nobody wants any more; it was saved before
	}
	o := head.Owner
	return o.SessionUID == s.owner.SessionUID && o.Node == s.owner.Node && o.Instance == s.owner.Instance &&
		(o.Generation == m.Acquired || o.Generation == m.Acquiring)
}

// stillOurs is for what was taken over for this very generation before. An object
// store that is away does not keep a session on this node's disk from starting
// again; one in a bucket needs it anyway.
func (s *Session) stillOurs(ctx context.Context) error {
	s.acquired.Store(true)
	if s.p.Adopt {
		return nil // it runs; Run looks at once
	}
	err := s.repo.Verify(ctx, s.owner)
	s.resumed = err == nil
	switch {
	case errors.Is(err, ErrFenced):
		s.fenced(ctx)
		return err
	case errors.Is(err, checkpoint.ErrNotFound): // it is made anew with the next save
		return nil
	case err != nil && !s.mountMode():
		s.log.Warn("it is not known whether the session is still this node's: it starts all the same", "error", err)
		return nil
	}
	return err
}

// unsavedFile, in the volume's state folder, says that there are changes that could
// not be saved: then the files are not removed with the session.
const unsavedFile = "unsaved"

func (s *Session) markUnsaved() {
	if err := os.WriteFile(filepath.Join(s.p.Volume.StateDir, unsavedFile), nil, 0o600); err != nil {
		s.log.Warn("it cannot be noted that there are unsaved changes", "error", err)
	}
}

// Unsaved says whether a volume has changes that could not be saved.
func (m *Manager) Unsaved(v volume.Volume) bool {
	_, err := os.Stat(filepath.Join(v.StateDir, unsavedFile))
	return err == nil
}

// fenced notes that the session is another node's: nothing that is here is taken
// for its newest state any more.
func (s *Session) fenced(ctx context.Context) {
	s.acquired.Store(false)
	if s.writer != nil {
		if changed, err := s.writer.Changed(ctx); changed || err != nil {
			s.markUnsaved()
		}
	}
	m := mark{UID: s.owner.SessionUID, Instance: s.owner.Instance}
	if err := m.save(s.p.Volume.StateDir); err != nil {
		s.log.Warn("it cannot be noted that another node has the session", "error", err)
	}
}

// bring makes the local tree that of the head. What was here before is of an
// older owner: what that had not saved yet is put aside and not deleted.
func (s *Session) bring(ctx context.Context, head checkpoint.Head, existed bool) error {
	if err := s.p.Stop(ctx); err != nil {
		return err
	}
	// Ours by now means that this was begun before, and perhaps not waited out.
	// One that the server has taken over in a node's name may still be written by that.
	byServer := head.Owner.Node == "" && time.Since(head.Time) < takeoverWait
	if existed && (!head.Released || byServer) && s.mountMode() {
		s.p.Progress("mount", "waiting until the node before has let go of the bucket", 0, 0)
		select {
		case <-time.After(takeoverWait):
		case <-ctx.Done():
			return ctx.Err()
		}
		// It may have moved the head once more before it saw who has it.
		if err := s.repo.Verify(ctx, s.owner); err != nil {
			return err
		}
	}
	if err := s.setAside(); err != nil {
		return err
	}
	if !existed || head.Manifest == "" || s.due(head) {
		return s.makeTree()
	}
	if err := s.fetch(ctx, head.Manifest); err != nil {
		return err
	}
	return s.putInPlace()
}

// next is where a checkpoint is brought to, beside the local tree.
func (s *Session) next() string { return filepath.Join(filepath.Dir(s.p.Volume.S3Dir), "next") }

// fetch brings a checkpoint's tree here, beside the local one.
func (s *Session) fetch(ctx context.Context, manifest string) error {
	v := s.p.Volume
	if err := mount.RemoveAll(s.next()); err != nil {
		return err
	}
	s.p.Progress("restore", "fetching checkpoint "+manifest, 0, 0)
	_, err := s.repo.Restore(ctx, manifest, checkpoint.RestoreOptions{
		Dir: s.next(), IDBase: v.IDBase,
		Progress: func(done, total int64) { s.p.Progress("restore", "fetching checkpoint "+manifest, done, total) },
	})
	if err != nil {
		return fmt.Errorf("fetching checkpoint %s: %w", manifest, err)
	}
	return nil
}

// putInPlace makes what was fetched the local tree. Its place is empty.
func (s *Session) putInPlace() error {
	// Whoever opened the volume meanwhile has made an empty folder, which this replaces;
	// os.Rename would not.
	if err := unix.Rename(s.next(), s.p.Volume.S3Dir); err != nil {
		return fmt.Errorf("putting the fetched files in place: %w", err)
	}
	return s.makeTree()
}

// aside is where setAside moves the local tree.
func (s *Session) aside() string { return filepath.Join(filepath.Dir(s.p.Volume.S3Dir), "aside") }

// setAside empties the place of the local tree. A tree with anything in it is
// kept under another name until the volume is removed, or the next one is set aside.
func (s *Session) setAside() error {
	v := s.p.Volume
	aside := s.aside()
	if err := Detach(v); err != nil { // the bucket would go with it
		return err
	}
	entries, err := os.ReadDir(v.S3Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if v.DiskBytes > 0 && !s.m.Unsaved(v) {
		return mount.RemoveAll(v.S3Dir) // there may be no room for two
	}
	if len(entries) > 0 {
		if err := mount.RemoveAll(aside); err != nil {
			return err
		}
		s.log.Info("another state of the session takes the place of its files here: putting them aside", "folder", aside)
		return os.Rename(v.S3Dir, aside)
	}
	if err := os.Remove(v.S3Dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// makeTree makes the folders that the local tree has at least.
func (s *Session) makeTree() error {
	v := s.p.Volume
	if err := os.Mkdir(v.S3Dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	dirs := []string{"."}
	if s.mountMode() {
		dirs = append(dirs, ".opencode")
		dirs = append(dirs, localDirs...)
	}
	tree, err := os.OpenRoot(v.S3Dir)
	if err != nil {
		return err
	}
	defer tree.Close()
	for _, d := range dirs {
		if err := makeOwned(tree, d, v.IDBase); err != nil {
			return err
		}
	}
	return nil
}

// makeOwned makes a folder of the container's root. What is in the tree is not
// trusted: a checkpoint can hold links to anywhere.
func makeOwned(tree *os.Root, dir string, id uint32) error {
	err := tree.Mkdir(dir, 0o755)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	fi, err := tree.Lstat(dir)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%w: /root/s3/%s is no folder", runtime.ErrInvalidSpec, dir)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || st.Uid != 0 {
		return nil // it was there
	}
	if err := tree.Chmod(dir, 0o755); err != nil { // whatever the umask
		return err
	}
	return tree.Lchown(dir, int(id), int(id))
}

// wanted names the restore that the assignment asks for.
func (s *Session) wanted() string {
	asked := s.a.GetRestoreGeneration()
	if asked == 0 { // of an older server
		asked = s.a.GetGeneration()
	}
	return fmt.Sprintf("%d/%s", asked, s.a.GetRestoreCheckpoint())
}

// due says whether the assignment asks for a restore that was not done yet. What
// the head names is not needed then: it may be what is damaged. A session that is
// only finished is saved as it is.
func (s *Session) due(head checkpoint.Head) bool {
	return !s.p.Ending && s.a.GetRestoreCheckpoint() != "" && head.Restored != s.wanted()
}

// restore takes the session back to the checkpoint that the assignment names,
// unless that was done. What was until then is saved first.
func (s *Session) restore(ctx context.Context, head checkpoint.Head, m *mark) error {
	if !s.due(head) {
		return nil
	}
	id, want := s.a.GetRestoreCheckpoint(), s.wanted()
	if err := s.p.Stop(ctx); err != nil {
		return err
	}
	if m.Restoring != want { // else the tree is half of both
		s.p.Progress("checkpoint", "saving the session as it is before it is taken back", 0, 0)
		if _, err := s.save(ctx, TriggerRestore, nil); err != nil {
			return fmt.Errorf("saving the session before it is taken back: %w", err)
		}
	}
	// Whatever is wrong with the checkpoint, until here the session is as it was.
	if err := s.fetch(ctx, id); err != nil {
		return err
	}
	m.Restoring = want
	if err := m.save(s.p.Volume.StateDir); err != nil {
		return err
	}
	s.closeWriter() // its base is another tree from here on
	if err := s.setAside(); err != nil {
		return err
	}
	if err := s.putInPlace(); err != nil {
		return err
	}
	s.restored = want
	if _, err := s.save(ctx, TriggerRestore, nil); err != nil {
		return err
	}
	return mount.RemoveAll(s.aside()) // it was saved
}

func (s *Session) closeStore() {
	if err := objstore.Close(s.store); err != nil {
		s.log.Debug("closing the object store", "error", err)
	}
}

// SetVersion tells of OpenCode's version, for manifests.
func (s *Session) SetVersion(v string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version = v
}

// Status of the session's storage; the caller's own copy.
func (s *Session) Status() *cloudcodev1.StorageStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return proto.CloneOf(s.status)
}

// setStatus changes the status and tells of it if that changed something.
func (s *Session) setStatus(change func(*cloudcodev1.StorageStatus)) {
	s.mu.Lock()
	before := proto.CloneOf(s.status)
	change(s.status)
	after := s.status
	same := proto.Equal(before, after)
	urgent := before.GetMountState() != after.GetMountState() || before.GetMessage() != after.GetMessage() ||
		(before.GetUnsavedSince() == nil) != (after.GetUnsavedSince() == nil)
	s.mu.Unlock()
	if !same {
		s.p.Changed(urgent)
	}
}

// Proto returns a checkpoint as the API shows it.
func Proto(i checkpoint.Info) *cloudcodev1.Checkpoint {
	return &cloudcodev1.Checkpoint{
		Id: i.ID, CreateTime: timestamppb.New(i.Time), Trigger: i.Meta.Trigger, Files: i.Files, Bytes: i.Bytes,
		UploadedBytes: i.UploadedBytes, OpencodeVersion: i.Meta.OpenCodeVersion, Generation: int64(i.Generation),
		Node: "nodes/" + i.Node, Notes: i.Notes,
	}
}

// Holds says whether the volume has files of the session that may be newer than
// its newest checkpoint.
func (m *Manager) Holds(v volume.Volume, a *nodev1.Assignment) (bool, error) {
	was, err := loadMark(v.StateDir)
	return was.UID == a.GetSessionUid() && was.Instance == m.cfg.Instance && was.Acquired != 0, err
}
