package api

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/storage"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// stored is a fixture with object storage in memory, and a node daemon.
type stored struct {
	*fixture
	objects *objstore.Memory
	node    *fakeNode

	mu      sync.Mutex
	checked []conf.Config
	fail    error // of checks
}

func newStored(t *testing.T) *stored {
	t.Helper()
	out := &stored{objects: objstore.NewMemory(), node: startNode(t)}
	profiles, err := conf.NewProfiles(nil, map[string]conf.Config{
		"default": {Endpoint: "https://s3.example.com", Bucket: "main", AccessKeyID: "key-id", SecretAccessKey: "hunter2", Root: "root", EncryptionKey: make([]byte, 32)},
		"tigris":  {Endpoint: "https://fly.storage.tigris.dev", Bucket: "other", AccessKeyID: "key-id", SecretAccessKey: "hunter2"},
	})
	if err != nil {
		t.Fatal(err)
	}
	out.fixture = newFixture(t, func(c *Config) {
		c.Agents = out.node
		c.Storage = storage.New(storage.Config{
			Store: c.Store, Profiles: profiles,
			Open: func(c conf.Config) (objstore.Store, error) {
				return objstore.WithPrefix(out.objects, c.Bucket+"/"+c.Root+"/"), nil
			},
			Check: func(_ context.Context, c conf.Config) (string, error) {
				out.mu.Lock()
				defer out.mu.Unlock()
				out.checked = append(out.checked, c)
				return "eu-1", out.fail
			},
		})
	})
	return out
}

// run puts a session on node n1, as the rest of the server does.
func (f *stored) run(t *testing.T, id string) {
	t.Helper()
	if _, err := f.store.Update(t.Context(), func(tx store.Tx) error { return tx.PutNode(&fleet.Node{ID: "n1", State: fleet.NodeReady}) }); err != nil {
		t.Fatal(err)
	}
	f.edit(t, id, func(s *fleet.Session) {
		s.State, s.Generation = fleet.StateRunning, s.Generation+1
		s.Assignment = &fleet.Assignment{Node: "n1", Generation: s.Generation, Spec: s.Spec.Clone(), Password: "hunter2"}
	})
}

// save makes a checkpoint of a session, as its node does.
func (f *stored) save(t *testing.T, id, trigger string, files map[string]string) string {
	t.Helper()
	s, _ := f.stored(t, id)
	dir := t.TempDir()
	for name, text := range files {
		full := filepath.Join(dir, "tree", name)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var key []byte
	if s.Spec.Storage.Profile == "default" {
		key = make([]byte, 32)
	}
	repo, err := checkpoint.Open(f.objects, s.Spec.Storage.Bucket+"/"+s.Spec.Storage.Root, key)
	if err != nil {
		t.Fatal(err)
	}
	sess := repo.Session(s.Spec.Storage.Prefix)
	o := checkpoint.Owner{SessionID: s.ID, SessionUID: s.UID, Node: "n1", Instance: "i", Generation: s.Generation}
	if _, _, err := sess.Acquire(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	w, err := sess.NewWriter(t.Context(), checkpoint.WriterOptions{
		Dir: filepath.Join(dir, "tree"), IDBase: uint32(os.Getuid()), Owner: o, StateDir: filepath.Join(dir, "state"),
	})
	if err != nil {
		t.Fatal(err)
	}
	record, err := storage.Record(s)
	if err != nil {
		t.Fatal(err)
	}
	info, err := w.Save(t.Context(), nil, checkpoint.Meta{Trigger: trigger, SessionJSON: record, Mode: string(s.Spec.Storage.Mode), OpenCodeVersion: "1.2"})
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return info.ID
}

// fakeNode is a node daemon that answers what the API asks, over real gRPC.
type fakeNode struct {
	nodev1.UnimplementedAgentServiceServer
	client nodev1.AgentServiceClient

	mu         sync.Mutex
	away       bool
	checkpoint func(*nodev1.CheckpointRequest) (*nodev1.CheckpointResponse, error)
	archive    [][]byte // what ReadArchive sends
	err        error    // after it, or of WriteArchive
	read       *nodev1.ReadArchiveRequest
	written    []*nodev1.WriteArchiveRequest
}

func startNode(t *testing.T) *fakeNode {
	t.Helper()
	n := &fakeNode{}
	l := bufconn.Listen(64 << 10)
	server := grpc.NewServer()
	nodev1.RegisterAgentServiceServer(server, n)
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	conn, err := grpc.NewClient("passthrough:///node", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		wg.Wait()
	})
	n.client = nodev1.NewAgentServiceClient(conn)
	return n
}

func (n *fakeNode) Agent(_ context.Context, id string) (nodev1.AgentServiceClient, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if id != "n1" || n.away {
		return nil, fmt.Errorf("%w: node %s has no connection", fleet.ErrUnavailable, id)
	}
	return n.client, nil
}

func (n *fakeNode) Checkpoint(_ context.Context, req *nodev1.CheckpointRequest) (*nodev1.CheckpointResponse, error) {
	return n.checkpoint(req)
}

func (n *fakeNode) ReadArchive(req *nodev1.ReadArchiveRequest, stream grpc.ServerStreamingServer[nodev1.ReadArchiveResponse]) error {
	n.read = req
	for i, data := range n.archive {
		resp := &nodev1.ReadArchiveResponse{Data: data}
		if i == 0 {
			resp.EstimatedBytes = 77
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
	return n.err
}

func (n *fakeNode) WriteArchive(stream grpc.ClientStreamingServer[nodev1.WriteArchiveRequest, nodev1.WriteArchiveResponse]) error {
	if n.err != nil {
		return n.err
	}
	bytes := int64(0)
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&nodev1.WriteArchiveResponse{Files: 3, Bytes: bytes})
		} else if err != nil {
			return err
		}
		n.written = append(n.written, req)
		bytes += int64(len(req.GetData()))
	}
}

func wantStorage(want *cloudcodev1.Storage) func(*cloudcodev1.Session) {
	return func(s *cloudcodev1.Session) { s.Spec.Storage = want }
}

func TestCreateWithStorage(t *testing.T) {
	f := newStored(t)
	made := f.create(t, "a", nil)
	if st := made.GetSpec().GetStorage(); st.GetMode() != cloudcodev1.Storage_SNAPSHOT || st.GetProfile() != "default" || st.GetPrefix() != "a" || st.Prefix == nil {
		t.Errorf("spec %v", st)
	}
	if st := made.GetStorage(); !st.GetPersistent() || st.GetUri() != "s3://main/root/a" || st.GetMode() != cloudcodev1.Storage_SNAPSHOT {
		t.Errorf("status %v", st)
	}
	local := f.create(t, "local", wantStorage(&cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL}))
	if st := local.GetStorage(); st.GetPersistent() || st.GetUri() != "" || st.GetMode() != cloudcodev1.Storage_LOCAL || local.GetSpec().GetStorage().Prefix != nil {
		t.Errorf("local: %v", local)
	}
	own := f.create(t, "own", wantStorage(&cloudcodev1.Storage{
		Prefix: proto.String(""),
		S3:     &cloudcodev1.S3Storage{Endpoint: "https://minio.example.com", Bucket: "mine", AccessKeyId: "me", SecretAccessKey: "hunter2"},
	}))
	if st := own.GetSpec().GetStorage(); st.GetS3().GetAccessKeyId() != "me" || st.Prefix == nil || st.GetPrefix() != "" || own.GetStorage().GetUri() != "s3://mine" {
		t.Errorf("own: %v", own)
	}
	if s, _ := f.stored(t, "own"); s.Spec.Storage.S3.SecretAccessKey != "hunter2" {
		t.Errorf("stored: %+v", s.Spec.Storage.S3)
	}
	// Nobody is shown a secret, in events neither.
	if err := f.store.View(t.Context(), func(tx store.ReadTx) error {
		for e := range tx.Events(own.GetUid(), 0) {
			if s3 := e.Session.Spec.Storage.S3; s3.SecretAccessKey != "" || s3.AccessKeyID != "me" {
				t.Errorf("event: %+v", s3)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	list, err := f.ListSessions(t.Context(), &cloudcodev1.ListSessionsRequest{})
	if err != nil || strings.Contains(protojson.Format(list), "hunter2") {
		t.Errorf("list: %v, %v", list, err)
	}

	create := func(id string, st *cloudcodev1.Storage) error {
		_, err := f.CreateSession(t.Context(), &cloudcodev1.CreateSessionRequest{
			SessionId: id, Session: &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Storage: st}},
		})
		return err
	}
	for name, c := range map[string]struct {
		st     *cloudcodev1.Storage
		code   codes.Code
		reason string
	}{
		"bad prefix":       {&cloudcodev1.Storage{Prefix: proto.String("/x/../y")}, codes.InvalidArgument, "INVALID_FIELDS"},
		"hidden prefix":    {&cloudcodev1.Storage{Prefix: proto.String(".cloudcode")}, codes.InvalidArgument, "INVALID_FIELDS"},
		"local and prefix": {&cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL, Prefix: proto.String("x")}, codes.InvalidArgument, "INVALID_FIELDS"},
		"mode":             {&cloudcodev1.Storage{Mode: 99}, codes.InvalidArgument, "INVALID_FIELDS"},
		"two places":       {&cloudcodev1.Storage{Profile: "default", S3: &cloudcodev1.S3Storage{}}, codes.InvalidArgument, "INVALID_FIELDS"},
		"incomplete":       {&cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{Bucket: "bbb"}}, codes.InvalidArgument, "STORAGE_INCOMPLETE"},
		"no such profile":  {&cloudcodev1.Storage{Profile: "nosuch"}, codes.NotFound, "STORAGE_PROFILE_NOT_FOUND"},
		"same folder":      {&cloudcodev1.Storage{Prefix: proto.String("a")}, codes.FailedPrecondition, "STORAGE_PREFIX_IN_USE"},
		"inside of it":     {&cloudcodev1.Storage{Prefix: proto.String("a/b")}, codes.FailedPrecondition, "STORAGE_PREFIX_IN_USE"},
		"all of it":        {&cloudcodev1.Storage{Prefix: proto.String("")}, codes.FailedPrecondition, "STORAGE_PREFIX_IN_USE"},
	} {
		wantErr(t, name, create("x", c.st), c.code, c.reason)
	}
	// A taken id is said before any object storage is asked.
	n := len(f.checked)
	wantErr(t, "taken", create("a", &cloudcodev1.Storage{Profile: "tigris"}), codes.AlreadyExists, "SESSION_EXISTS")
	if len(f.checked) != n {
		t.Error("the object storage was asked")
	}
	f.fail = fmt.Errorf("%w: wrong", objstore.ErrDenied)
	wantErr(t, "wrong keys", create("x", &cloudcodev1.Storage{Profile: "tigris"}), codes.FailedPrecondition, "STORAGE_DENIED")
	if _, err := f.GetSession(t.Context(), &cloudcodev1.GetSessionRequest{Name: "sessions/x"}); err == nil {
		t.Error("a session that was refused is there")
	}
}

// Who asks for one folder at the same time gets it once.
func TestOneFolderOneSession(t *testing.T) {
	f := newStored(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var made, refused int
	for range 10 {
		wg.Go(func() {
			_, err := f.CreateSession(t.Context(), &cloudcodev1.CreateSessionRequest{
				Session: &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Storage: &cloudcodev1.Storage{Prefix: proto.String("shared")}}},
			})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				made++
			case grpcerr.Reason(err) == "STORAGE_PREFIX_IN_USE":
				refused++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if made != 1 || refused != 9 {
		t.Errorf("%d made, %d refused", made, refused)
	}
}

func TestRequestIDWithStorage(t *testing.T) {
	f := newStored(t)
	req := &cloudcodev1.CreateSessionRequest{RequestId: "6ba7b810-9dad-41d1-80b4-00c04fd430c8", Session: &cloudcodev1.Session{}}
	first, err := f.CreateSession(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	// A retry is answered also while the object storage is away.
	f.fail = fmt.Errorf("%w: no", objstore.ErrUnavailable)
	again, err := f.CreateSession(t.Context(), req)
	if err != nil || again.GetUid() != first.GetUid() {
		t.Errorf("%v, %v", again, err)
	}
}

func TestUpdateKeys(t *testing.T) {
	f := newStored(t)
	f.create(t, "own", wantStorage(&cloudcodev1.Storage{
		S3: &cloudcodev1.S3Storage{Endpoint: "https://minio.example.com", Bucket: "mine", AccessKeyId: "me", SecretAccessKey: "hunter2"},
	}))
	f.create(t, "a", nil)
	update := func(id string, st *cloudcodev1.Storage, mask ...string) (*cloudcodev1.Session, error) {
		req := &cloudcodev1.UpdateSessionRequest{Session: &cloudcodev1.Session{Name: "sessions/" + id, Spec: &cloudcodev1.SessionSpec{Storage: st}}}
		if mask != nil {
			req.UpdateMask = &fieldmaskpb.FieldMask{Paths: mask}
		}
		return f.UpdateSession(t.Context(), req)
	}
	before := len(f.checked)
	got, err := update("own", &cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{AccessKeyId: "new", SecretAccessKey: "hunter3"}}, "spec.storage.s3.access_key_id", "spec.storage.s3.secret_access_key")
	if err != nil || got.GetSpec().GetStorage().GetS3().GetAccessKeyId() != "new" || got.GetSpec().GetStorage().GetS3().GetBucket() != "mine" {
		t.Errorf("%v, %v", got, err)
	}
	if s, _ := f.stored(t, "own"); s.Spec.Storage.S3.SecretAccessKey != "hunter3" || len(f.checked) != before+1 || f.checked[before].SecretAccessKey != "hunter3" {
		t.Errorf("stored %+v, checked %d", s.Spec.Storage.S3, len(f.checked)-before)
	}
	// What is given back as it was shown changes nothing.
	same, err := update("own", got.GetSpec().GetStorage())
	if err != nil || same.GetEtag() != got.GetEtag() {
		t.Errorf("given back: %v, %v", same, err)
	}
	if s, _ := f.stored(t, "own"); s.Spec.Storage.S3.SecretAccessKey != "hunter3" {
		t.Errorf("the secret became %q", s.Spec.Storage.S3.SecretAccessKey)
	}
	for name, c := range map[string]struct {
		id   string
		st   *cloudcodev1.Storage
		mask []string
	}{
		"mode":         {"a", &cloudcodev1.Storage{Mode: cloudcodev1.Storage_MOUNT}, nil},
		"profile":      {"a", &cloudcodev1.Storage{Profile: "tigris"}, nil},
		"prefix":       {"a", &cloudcodev1.Storage{Prefix: proto.String("b")}, []string{"*"}},
		"mask":         {"a", &cloudcodev1.Storage{}, []string{"spec.storage.mode"}},
		"bucket":       {"own", &cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{Bucket: "yours"}}, []string{"spec.storage"}},
		"not its own":  {"a", &cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{SecretAccessKey: "x"}}, nil},
		"another root": {"own", &cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{Prefix: "p"}}, nil},
	} {
		_, err := update(c.id, c.st, c.mask...)
		wantErr(t, name, err, codes.InvalidArgument, "INVALID_FIELDS")
	}
	f.fail = fmt.Errorf("%w: wrong", objstore.ErrDenied)
	_, err = update("own", &cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{SecretAccessKey: "wrong"}})
	wantErr(t, "wrong keys", err, codes.InvalidArgument, "STORAGE_DENIED")
	if s, _ := f.stored(t, "own"); s.Spec.Storage.S3.SecretAccessKey != "hunter3" {
		t.Error("wrong keys were stored")
	}
}

func TestCheckpoints(t *testing.T) {
	f := newStored(t)
	f.create(t, "a", nil)
	list := func(size int32, token string) (*cloudcodev1.ListCheckpointsResponse, error) {
		return f.ListCheckpoints(t.Context(), &cloudcodev1.ListCheckpointsRequest{Parent: "sessions/a", PageSize: size, PageToken: token})
	}
	if got, err := list(0, ""); err != nil || len(got.GetCheckpoints()) != 0 {
		t.Errorf("none yet: %v, %v", got, err)
	}
	f.run(t, "a")
	var ids []string
	for i := range 5 {
		ids = append(ids, f.save(t, "a", "turn", map[string]string{"workspace/project/x": fmt.Sprint(i), fmt.Sprintf("f%d", i): "x"}))
	}
	slices.Reverse(ids)
	var got []string
	pages := 0
	for token := ""; ; pages++ {
		resp, err := list(2, token)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range resp.GetCheckpoints() {
			got = append(got, c.GetId())
			if c.GetTrigger() != "turn" || c.GetNode() != "nodes/n1" || c.GetGeneration() != 1 || c.GetFiles() == 0 || c.GetCreateTime() == nil || c.GetOpencodeVersion() != "1.2" {
				t.Errorf("checkpoint %v", c)
			}
		}
		if token = resp.GetNextPageToken(); token == "" {
			break
		}
	}
	if !slices.Equal(got, ids) || pages != 2 {
		t.Errorf("got %v on %d pages, want %v", got, pages+1, ids)
	}
	resp, _ := list(2, "")
	_, err := f.ListCheckpoints(t.Context(), &cloudcodev1.ListCheckpointsRequest{Parent: "sessions/b", PageToken: resp.GetNextPageToken()})
	wantErr(t, "token of another session", err, codes.InvalidArgument, "INVALID_FIELDS")
	f.create(t, "local", wantStorage(&cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL}))
	_, err = f.ListCheckpoints(t.Context(), &cloudcodev1.ListCheckpointsRequest{Parent: "sessions/local"})
	wantErr(t, "local", err, codes.FailedPrecondition, "STORAGE_LOCAL")
	f.objects.Fail = func(string, string) error { return fmt.Errorf("%w: refused", objstore.ErrUnavailable) }
	_, err = list(0, "")
	wantErr(t, "away", err, codes.Unavailable, "STORAGE_UNREACHABLE")
}

func TestCheckpointNow(t *testing.T) {
	f := newStored(t)
	f.create(t, "a", nil)
	now := func(id string) (*cloudcodev1.Checkpoint, error) {
		return f.CheckpointSession(t.Context(), &cloudcodev1.CheckpointSessionRequest{Name: "sessions/" + id})
	}
	_, err := now("a")
	wantErr(t, "not placed", err, codes.FailedPrecondition, "SESSION_NOT_RUNNING")
	f.run(t, "a")
	f.node.checkpoint = func(req *nodev1.CheckpointRequest) (*nodev1.CheckpointResponse, error) {
		return &nodev1.CheckpointResponse{Checkpoint: &cloudcodev1.Checkpoint{Id: req.GetSessionId() + "-" + req.GetTrigger()}}, nil
	}
	if got, err := now("a"); err != nil || got.GetId() != "a-manual" {
		t.Errorf("%v, %v", got, err)
	}
	// A node that has been taken over tells what it likes.
	long := strings.Repeat("é", 8<<10)
	f.node.checkpoint = func(*nodev1.CheckpointRequest) (*nodev1.CheckpointResponse, error) {
		c := &cloudcodev1.Checkpoint{
			Id: long, Trigger: long, OpencodeVersion: long, Node: "nodes/another", CreateTime: timestamppb.Now(), Files: 3, Notes: slices.Repeat([]string{long}, 150),
		}
		c.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 999, protowire.BytesType), long))
		return &nodev1.CheckpointResponse{Checkpoint: c}, nil
	}
	got, err := now("a")
	if err != nil || proto.Size(got) > 500<<10 || len(got.GetNotes()) != 100 || got.GetNode() == "nodes/another" || got.GetFiles() != 3 || !got.GetCreateTime().IsValid() {
		t.Errorf("%d bytes, %d notes, node %q, %v", proto.Size(got), len(got.GetNotes()), got.GetNode(), err)
	}
	f.node.checkpoint = func(*nodev1.CheckpointRequest) (*nodev1.CheckpointResponse, error) {
		return nil, grpcerr.New(codes.Unavailable, "STORAGE_UNREACHABLE", "no answer")
	}
	_, err = now("a")
	wantErr(t, "the node's words", err, codes.Unavailable, "STORAGE_UNREACHABLE")
	f.node.away = true
	_, err = now("a")
	wantErr(t, "no node", err, codes.Unavailable, "UNAVAILABLE")
	f.node.away = false
	f.node.checkpoint = func(*nodev1.CheckpointRequest) (*nodev1.CheckpointResponse, error) {
		return nil, grpcerr.New(codes.NotFound, "SESSION_NOT_HERE", "not here")
	}
	_, err = now("a")
	wantErr(t, "not there yet", err, codes.FailedPrecondition, "SESSION_NOT_STARTED")
	f.create(t, "local", wantStorage(&cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL}))
	f.run(t, "local")
	_, err = now("local")
	wantErr(t, "local", err, codes.FailedPrecondition, "STORAGE_LOCAL")
}

func TestRestore(t *testing.T) {
	f := newStored(t)
	made := f.create(t, "a", nil)
	f.run(t, "a")
	old := f.save(t, "a", "turn", map[string]string{"x": "1"})
	f.save(t, "a", "turn", map[string]string{"x": "2"})
	restore := func(id, checkpoint, etag string) (*cloudcodev1.Session, error) {
		return f.RestoreSession(t.Context(), &cloudcodev1.RestoreSessionRequest{Name: "sessions/" + id, Checkpoint: checkpoint, Etag: etag})
	}
	_, err := restore("a", "", "")
	wantErr(t, "no checkpoint", err, codes.InvalidArgument, "INVALID_FIELDS")
	_, err = restore("a", "20200101", "")
	wantErr(t, "unknown", err, codes.NotFound, "CHECKPOINT_NOT_FOUND")
	_, err = restore("a", "2", "")
	wantErr(t, "not unique", err, codes.NotFound, "CHECKPOINT_NOT_FOUND")
	_, err = restore("a", old, made.GetEtag())
	wantErr(t, "old etag", err, codes.Aborted, "ETAG_MISMATCH")
	got, err := restore("a", old[:len(old)-2], "")
	if err != nil || got.GetState() != cloudcodev1.Session_STARTING || !strings.Contains(got.GetMessage(), old) {
		t.Errorf("%v, %v", got, err)
	}
	if s, _ := f.stored(t, "a"); s.RestoreCheckpoint != old || s.Assignment.Generation != 1 {
		t.Errorf("stored %+v", s) // the reconciler makes the next generation
	}
	f.create(t, "mount", wantStorage(&cloudcodev1.Storage{Mode: cloudcodev1.Storage_MOUNT}))
	_, err = restore("mount", "2", "")
	wantErr(t, "mount", err, codes.FailedPrecondition, "STORAGE_MOUNT")
	f.edit(t, "a", func(s *fleet.Session) { s.State = fleet.StateLost })
	_, err = restore("a", old, "")
	wantErr(t, "lost", err, codes.FailedPrecondition, "SESSION_LOST")
}

func TestFork(t *testing.T) {
	f := newStored(t)
	f.create(t, "a", func(s *cloudcodev1.Session) {
		s.Labels = map[string]string{"team": "web"}
		s.Spec.Env = map[string]string{"A": "1"}
	})
	fork := func(req *cloudcodev1.ForkSessionRequest) (*cloudcodev1.Session, error) {
		req.Name = "sessions/a"
		return f.ForkSession(t.Context(), req)
	}
	_, err := fork(&cloudcodev1.ForkSessionRequest{})
	wantErr(t, "never saved", err, codes.NotFound, "CHECKPOINT_NOT_FOUND")
	f.run(t, "a")
	old := f.save(t, "a", "turn", map[string]string{"x": "1"})
	f.node.checkpoint = func(req *nodev1.CheckpointRequest) (*nodev1.CheckpointResponse, error) {
		if req.GetTrigger() != "fork" {
			t.Errorf("trigger %q", req.GetTrigger())
		}
		return &nodev1.CheckpointResponse{Checkpoint: &cloudcodev1.Checkpoint{Id: f.save(t, "a", "fork", map[string]string{"x": "now"})}}, nil
	}
	read := func(id string) string {
		t.Helper()
		stream, err := f.ReadArchive(t.Context(), &cloudcodev1.ReadArchiveRequest{Name: "sessions/" + id, Path: "/root/s3/x"})
		if err != nil {
			t.Fatal(err)
		}
		files, err := untar(stream)
		if err != nil {
			t.Fatal(err)
		}
		return files["x"]
	}
	packs := len(f.objects.Keys())
	got, err := fork(&cloudcodev1.ForkSessionRequest{SessionId: "b", Checkpoint: old[:len(old)-1], RequestId: "6ba7b810-9dad-41d1-80b4-00c04fd430c8"})
	if err != nil {
		t.Fatal(err)
	}
	if got.GetName() != "sessions/b" || got.GetState() != cloudcodev1.Session_PENDING || got.GetLabels()["team"] != "web" || got.GetSpec().GetEnv()["A"] != "1" ||
		got.GetSpec().GetStorage().GetPrefix() != "b" || got.GetGeneration() != 0 {
		t.Errorf("fork %v", got)
	}
	if n := len(f.objects.Keys()); n != packs+2 {
		t.Errorf("a fork wrote %d objects, not a manifest and a head", n-packs)
	}
	if text := read("b"); text != "1" {
		t.Errorf("the fork holds %q", text)
	}
	again, err := fork(&cloudcodev1.ForkSessionRequest{SessionId: "b", Checkpoint: old[:len(old)-1], RequestId: "6ba7b810-9dad-41d1-80b4-00c04fd430c8"})
	if err != nil || again.GetUid() != got.GetUid() {
		t.Errorf("the same request again: %v, %v", again, err)
	}
	now, err := fork(&cloudcodev1.ForkSessionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if text := read(strings.TrimPrefix(now.GetName(), "sessions/")); text != "now" {
		t.Errorf("the fork of now holds %q", text)
	}
	_, err = fork(&cloudcodev1.ForkSessionRequest{SessionId: "b"})
	wantErr(t, "taken", err, codes.AlreadyExists, "SESSION_EXISTS")
	// A deleted session's checkpoints stay, and are not overwritten.
	if _, err := f.store.Update(t.Context(), func(tx store.Tx) error { return tx.DeleteSession("b") }); err != nil {
		t.Fatal(err)
	}
	_, err = fork(&cloudcodev1.ForkSessionRequest{SessionId: "b", Checkpoint: old})
	wantErr(t, "an old folder", err, codes.FailedPrecondition, "STORAGE_PREFIX_IN_USE")
	f.node.away = true
	_, err = fork(&cloudcodev1.ForkSessionRequest{SessionId: "c"})
	wantErr(t, "cannot be saved", err, codes.Unavailable, "UNAVAILABLE")
	f.edit(t, "a", func(s *fleet.Session) { s.State = fleet.StateLost })
	if _, err := fork(&cloudcodev1.ForkSessionRequest{SessionId: "c"}); err != nil || read("c") != "now" {
		t.Errorf("of what is lost: %v", err)
	}
	f.create(t, "mount", wantStorage(&cloudcodev1.Storage{Mode: cloudcodev1.Storage_MOUNT}))
	_, err = f.ForkSession(t.Context(), &cloudcodev1.ForkSessionRequest{Name: "sessions/mount"})
	wantErr(t, "mount", err, codes.FailedPrecondition, "STORAGE_MOUNT")
}

func untar(stream grpc.ServerStreamingClient[cloudcodev1.ReadArchiveResponse]) (map[string]string, error) {
	var all bytes.Buffer
	for {
		got, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		all.Write(got.GetData())
	}
	files := map[string]string{}
	for r := tar.NewReader(&all); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, nil
		} else if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		files[h.Name] = string(data)
	}
}

func TestReadArchive(t *testing.T) {
	f := newStored(t)
	f.create(t, "a", nil)
	read := func(req *cloudcodev1.ReadArchiveRequest) (map[string]string, error) {
		if req.GetName() == "" {
			req.Name = "sessions/a"
		}
		stream, err := f.ReadArchive(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		return untar(stream)
	}
	_, err := read(&cloudcodev1.ReadArchiveRequest{})
	wantErr(t, "never saved", err, codes.FailedPrecondition, "CHECKPOINT_NOT_FOUND")
	for _, p := range []string{"/etc/passwd", "../../../../etc", "/root/s3/../x", strings.Repeat("a", 5000)} {
		_, err := read(&cloudcodev1.ReadArchiveRequest{Path: p})
		wantErr(t, p, err, codes.InvalidArgument, "INVALID_FIELDS")
	}
	f.run(t, "a")
	big := strings.Repeat("0123456789abcdef", 100<<10)
	id := f.save(t, "a", "turn", map[string]string{"workspace/project/big": big, "workspace/project/dir/x": "1", "y": "2"})
	f.save(t, "a", "turn", map[string]string{"y": "newer"})

	// On a ready node: as it is now.
	f.node.archive = [][]byte{[]byte("from "), []byte("the node")}
	stream, err := f.ReadArchive(t.Context(), &cloudcodev1.ReadArchiveRequest{Name: "sessions/a", Path: "dir"})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || string(first.GetData()) != "from " || first.GetEstimatedBytes() != 77 || f.node.read.GetPath() != "dir" || f.node.read.GetSessionId() != "a" {
		t.Errorf("%v, %v, asked for %v", first, err, f.node.read)
	}
	f.node.archive, f.node.err = nil, grpcerr.New(codes.NotFound, "FILE_NOT_FOUND", "no such file")
	_, err = read(&cloudcodev1.ReadArchiveRequest{Path: "nosuch"})
	wantErr(t, "not on the node", err, codes.NotFound, "FILE_NOT_FOUND")

	// A checkpoint is read from the bucket, whatever the node does.
	got, err := read(&cloudcodev1.ReadArchiveRequest{Path: "", Checkpoint: id})
	if err != nil || got["workspace/project/big"] != big || got["workspace/project/dir/x"] != "1" || got["y"] != "2" {
		t.Errorf("all of it: %d files, %v", len(got), err)
	}
	got, err = read(&cloudcodev1.ReadArchiveRequest{Path: "dir", Checkpoint: id})
	if err != nil || got["dir/x"] != "1" || len(got) != 2 {
		t.Errorf("a folder: %v, %v", got, err)
	}
	_, err = read(&cloudcodev1.ReadArchiveRequest{Path: "nosuch", Checkpoint: id})
	wantErr(t, "not in the checkpoint", err, codes.NotFound, "FILE_NOT_FOUND")
	_, err = read(&cloudcodev1.ReadArchiveRequest{Checkpoint: "20200101"})
	wantErr(t, "no such checkpoint", err, codes.NotFound, "CHECKPOINT_NOT_FOUND")
	// On no ready node: the newest checkpoint.
	f.edit(t, "a", func(s *fleet.Session) { s.State, s.Assignment = fleet.StateSuspended, nil })
	if got, err = read(&cloudcodev1.ReadArchiveRequest{Path: "/root/s3/y"}); err != nil || got["y"] != "newer" {
		t.Errorf("suspended: %v, %v", got, err)
	}

	f.create(t, "mount", wantStorage(&cloudcodev1.Storage{Mode: cloudcodev1.Storage_MOUNT}))
	_, err = read(&cloudcodev1.ReadArchiveRequest{Name: "sessions/mount"})
	wantErr(t, "mount", err, codes.FailedPrecondition, "STORAGE_MOUNT")
	f.create(t, "local", wantStorage(&cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL}))
	_, err = read(&cloudcodev1.ReadArchiveRequest{Name: "sessions/local"})
	wantErr(t, "local, not placed", err, codes.FailedPrecondition, "SESSION_NOT_PLACED")
	_, err = read(&cloudcodev1.ReadArchiveRequest{Name: "sessions/local", Checkpoint: "2"})
	wantErr(t, "local, checkpoint", err, codes.FailedPrecondition, "STORAGE_LOCAL")
	f.edit(t, "local", func(s *fleet.Session) {
		s.State, s.Assignment = fleet.StateLost, &fleet.Assignment{Node: "n2"}
	})
	_, err = read(&cloudcodev1.ReadArchiveRequest{Name: "sessions/local"})
	wantErr(t, "local, node away", err, codes.Unavailable, "NODE_UNREACHABLE")
}

func TestWriteArchive(t *testing.T) {
	f := newStored(t)
	f.create(t, "a", nil)
	write := func(first *cloudcodev1.WriteArchiveRequest, more ...string) (*cloudcodev1.WriteArchiveResponse, error) {
		stream, err := f.WriteArchive(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_ = stream.Send(first) // what is wrong is in the answer
		for _, data := range more {
			_ = stream.Send(&cloudcodev1.WriteArchiveRequest{Data: []byte(data)})
		}
		return stream.CloseAndRecv()
	}
	_, err := write(&cloudcodev1.WriteArchiveRequest{})
	wantErr(t, "no name", err, codes.InvalidArgument, "INVALID_FIELDS")
	_, err = write(&cloudcodev1.WriteArchiveRequest{Name: "sessions/a", Path: "/etc"})
	wantErr(t, "outside", err, codes.InvalidArgument, "INVALID_FIELDS")
	_, err = write(&cloudcodev1.WriteArchiveRequest{Name: "sessions/b"})
	wantErr(t, "unknown", err, codes.NotFound, "SESSION_NOT_FOUND")
	_, err = write(&cloudcodev1.WriteArchiveRequest{Name: "sessions/a"}, "x")
	wantErr(t, "does not run", err, codes.FailedPrecondition, "SESSION_NOT_RUNNING")
	f.run(t, "a")
	got, err := write(&cloudcodev1.WriteArchiveRequest{Name: "sessions/a", Data: []byte("one ")}, "two ", "three")
	if err != nil || got.GetFiles() != 3 || got.GetBytes() != 13 {
		t.Errorf("%v, %v", got, err)
	}
	text := ""
	for i, req := range f.node.written {
		text += string(req.GetData())
		if (i == 0) != (req.GetSessionId() == "a" && req.GetPath() == "/root/s3") {
			t.Errorf("message %d: %v", i, req)
		}
	}
	if text != "one two three" {
		t.Errorf("the node got %q", text)
	}
	f.node.err = grpcerr.New(codes.ResourceExhausted, "NODE_DISK_FULL", "no room")
	_, err = write(&cloudcodev1.WriteArchiveRequest{Name: "sessions/a"}, strings.Repeat("x", 1<<20), strings.Repeat("x", 1<<20))
	wantErr(t, "full", err, codes.ResourceExhausted, "NODE_DISK_FULL")
}

func TestDeleteAndPurge(t *testing.T) {
	f := newStored(t)
	f.create(t, "a", nil)
	del := func(purge bool) *fleet.Session {
		t.Helper()
		got, err := f.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/a", PurgeStorage: purge})
		if err != nil || got.GetState() != cloudcodev1.Session_DELETING {
			t.Fatalf("%v, %v", got, err)
		}
		s, _ := f.stored(t, "a")
		return s
	}
	if s := del(true); !s.Deleting || !s.Purge {
		t.Errorf("%+v", s)
	}
	f.edit(t, "a", func(s *fleet.Session) { s.Reason, s.Message = "STORAGE_DENIED", "m" })
	if s := del(true); s.Reason != "STORAGE_DENIED" {
		t.Errorf("a retry changed %+v", s)
	}
	if s := del(false); !s.Deleting || s.Purge || s.Reason != "" {
		t.Errorf("taken back: %+v", s)
	}
	// Too late: its record goes within moments, and nobody would purge anything.
	f.edit(t, "a", func(s *fleet.Session) { s.StorageSettled = true })
	_, err := f.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/a", PurgeStorage: true})
	wantErr(t, "purge of what is settled", err, codes.FailedPrecondition, "SESSION_DELETING")
	if s := del(false); s.Purge || !s.StorageSettled {
		t.Errorf("a retry changed %+v", s)
	}
}

func TestDeleteWhatIsLost(t *testing.T) {
	f := newStored(t)
	f.create(t, "a", nil)
	f.run(t, "a")
	for i, left := range []bool{false, true} {
		got, err := f.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/a"})
		if err != nil || (got.GetNode() == "") != left {
			t.Errorf("time %d: %v, %v", i, got, err)
		}
		// The reconciler finds that the node is away.
		f.edit(t, "a", func(s *fleet.Session) { s.Reason = fleet.ReasonNodeUnreachable })
	}
}

func TestStorageProfiles(t *testing.T) {
	f := newStored(t)
	got, err := f.storages.ListStorageProfiles(t.Context(), &cloudcodev1.ListStorageProfilesRequest{})
	if err != nil || len(got.GetStorageProfiles()) != 2 || strings.Contains(protojson.Format(got), "hunter2") || strings.Contains(protojson.Format(got), "key-id") {
		t.Fatalf("%v, %v", got, err)
	}
	d, tigris := got.GetStorageProfiles()[0], got.GetStorageProfiles()[1]
	if d.GetName() != "storageProfiles/default" || d.GetBucket() != "main" || d.GetPrefix() != "root" || !d.GetEncrypted() || d.GetAutoMode() != cloudcodev1.Storage_SNAPSHOT {
		t.Errorf("default %v", d)
	}
	if tigris.GetAutoMode() != cloudcodev1.Storage_MOUNT || tigris.GetEncrypted() {
		t.Errorf("tigris %v", tigris)
	}
	none := newFixture(t, nil)
	if got, err := none.storages.ListStorageProfiles(t.Context(), &cloudcodev1.ListStorageProfilesRequest{}); err != nil || len(got.GetStorageProfiles()) != 0 {
		t.Errorf("without: %v, %v", got, err)
	}
}

func TestRecover(t *testing.T) {
	f := newStored(t)
	for _, id := range []string{"kept", "lost", "asleep", "gone", "empty", "broken", "taken"} {
		f.create(t, id, func(s *cloudcodev1.Session) {
			s.Labels = map[string]string{"team": "web"}
			s.Spec.Env = map[string]string{"A": id}
		})
		f.run(t, id)
	}
	uids := map[string]string{}
	for _, id := range []string{"kept", "lost", "gone", "broken", "taken", "asleep"} {
		f.save(t, id, "turn", map[string]string{"x": id})
	}
	repo, err := checkpoint.Open(f.objects, "main/root", make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"gone", "asleep"} {
		head, err := repo.Session(id).Head(t.Context())
		if err == nil {
			err = repo.Session(id).Release(t.Context(), head.Owner, id == "gone")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := repo.Session("empty").Acquire(t.Context(), checkpoint.Owner{SessionID: "empty", SessionUID: "u", Generation: 1}); err != nil {
		t.Fatal(err)
	}
	head, err := repo.Session("broken").Head(t.Context())
	if err == nil {
		err = f.objects.Damage("main/root/.cloudcode/v1/sessions/broken/manifests/"+head.Manifest, func(data []byte) []byte { return data[:len(data)/2] })
	}
	if err != nil {
		t.Fatal(err)
	}
	// A new server over the old bucket, but for one session.
	for _, id := range []string{"lost", "asleep", "gone", "empty", "broken", "taken"} {
		s, _ := f.stored(t, id)
		uids[id] = s.UID
		if _, err := f.store.Update(t.Context(), func(tx store.Tx) error { return tx.DeleteSession(id) }); err != nil {
			t.Fatal(err)
		}
	}
	f.create(t, "taken", wantStorage(&cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL}))

	list, err := f.storages.ListStoredSessions(t.Context(), &cloudcodev1.ListStoredSessionsRequest{Parent: "storageProfiles/default"})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]*cloudcodev1.StoredSession{}
	for _, s := range list.GetSessions() {
		seen[s.GetPrefix()] = s
	}
	if len(seen) != 7 || !seen["kept"].GetKnown() || seen["lost"].GetKnown() || seen["lost"].GetUid() != uids["lost"] || seen["lost"].GetCheckpoint().GetTrigger() != "turn" ||
		seen["lost"].GetMode() != cloudcodev1.Storage_SNAPSHOT || seen["gone"].GetDeleteTime() == nil || seen["lost"].GetDeleteTime() != nil ||
		seen["broken"].GetMessage() == "" || seen["empty"].GetMessage() == "" || seen["lost"].GetMessage() != "" {
		t.Errorf("stored sessions: %v", seen)
	}
	_, err = f.storages.ListStoredSessions(t.Context(), &cloudcodev1.ListStoredSessionsRequest{Parent: "storageProfiles/nosuch"})
	wantErr(t, "no such profile", err, codes.NotFound, "STORAGE_PROFILE_NOT_FOUND")

	got, err := f.storages.RecoverSessions(t.Context(), &cloudcodev1.RecoverSessionsRequest{Parent: "storageProfiles/default"})
	if err != nil {
		t.Fatal(err)
	}
	made := map[string]*cloudcodev1.Session{}
	for _, s := range got.GetSessions() {
		made[s.GetName()] = s
	}
	failed := map[string]string{}
	for _, x := range got.GetFailures() {
		failed[x.GetSessionId()] = x.GetReason()
	}
	if len(made) != 2 || len(failed) != 2 || failed["broken"] != "CHECKPOINT_DAMAGED" || failed["taken"] != "SESSION_EXISTS" {
		t.Errorf("recovered %v, failed %v", made, failed)
	}
	lost := made["sessions/lost"]
	if lost.GetState() != cloudcodev1.Session_PENDING || lost.GetUid() != uids["lost"] || lost.GetSpec().GetEnv()["A"] != "lost" || lost.GetLabels()["team"] != "web" ||
		lost.GetGeneration() != 1 || lost.GetStorage().GetUri() != "s3://main/root/lost" || lost.GetStorage().GetCheckpoint().GetId() == "" {
		t.Errorf("recovered %v", lost)
	}
	if made["sessions/asleep"].GetState() != cloudcodev1.Session_SUSPENDED {
		t.Errorf("what was suspended is %v", made["sessions/asleep"])
	}

	// By name also what was deleted; each that cannot be is said.
	got, err = f.storages.RecoverSessions(t.Context(), &cloudcodev1.RecoverSessionsRequest{
		Parent: "storageProfiles/default", SessionIds: []string{"gone", "gone", "kept", "empty", "nosuch"},
	})
	if err != nil || len(got.GetSessions()) != 1 || got.GetSessions()[0].GetName() != "sessions/gone" {
		t.Fatalf("%v, %v", got, err)
	}
	clear(failed)
	for _, x := range got.GetFailures() {
		failed[x.GetSessionId()] = x.GetReason()
	}
	if len(failed) != 3 || failed["kept"] != "SESSION_EXISTS" || failed["empty"] != "CHECKPOINT_NOT_FOUND" || failed["nosuch"] != "SESSION_NOT_FOUND" {
		t.Errorf("failed %v", failed)
	}
}
