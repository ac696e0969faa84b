package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/internal/container"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

type (
	archiveOut = grpc.ServerStreamingServer[cloudcodev1.ReadArchiveResponse]
	archiveIn  = grpc.ClientStreamingServer[cloudcodev1.WriteArchiveRequest, cloudcodev1.WriteArchiveResponse]
)

func (f *fleet) SuspendSession(_ context.Context, req *cloudcodev1.SuspendSessionRequest) (*cloudcodev1.Session, error) {
	return f.change(req.GetName(), f.onSuspend)
}

func (f *fleet) ResumeSession(_ context.Context, req *cloudcodev1.ResumeSessionRequest) (*cloudcodev1.Session, error) {
	return f.change(req.GetName(), f.onResume)
}

func (f *fleet) change(name string, fn func(*cloudcodev1.Session) (*cloudcodev1.Session, error)) (*cloudcodev1.Session, error) {
	s, err := f.get(name)
	if err == nil && fn != nil {
		s, err = fn(s)
	}
	if err != nil {
		return nil, err
	}
	f.put(s)
	return s, nil
}

func (f *fleet) RestoreSession(_ context.Context, req *cloudcodev1.RestoreSessionRequest) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	f.restores = append(f.restores, proto.CloneOf(req))
	f.mu.Unlock()
	return f.onRestore(req)
}

func (f *fleet) ForkSession(_ context.Context, req *cloudcodev1.ForkSessionRequest) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	f.forks = append(f.forks, proto.CloneOf(req))
	f.mu.Unlock()
	return f.onFork(req)
}

func (f *fleet) CheckpointSession(_ context.Context, req *cloudcodev1.CheckpointSessionRequest) (*cloudcodev1.Checkpoint, error) {
	if _, err := f.get(req.GetName()); err != nil {
		return nil, err
	}
	return f.saved[0], nil
}

// ListCheckpoints has one checkpoint per page.
func (f *fleet) ListCheckpoints(_ context.Context, req *cloudcodev1.ListCheckpointsRequest) (*cloudcodev1.ListCheckpointsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &cloudcodev1.ListCheckpointsResponse{}
	for i, c := range f.saved {
		if req.GetPageToken() == "" || req.GetPageToken() == c.GetId() {
			resp.Checkpoints = f.saved[i : i+1]
			if i+1 < len(f.saved) {
				resp.NextPageToken = f.saved[i+1].GetId()
			}
			break
		}
	}
	return resp, nil
}

func (f *fleet) ListStorageProfiles(context.Context, *cloudcodev1.ListStorageProfilesRequest) (*cloudcodev1.ListStorageProfilesResponse, error) {
	return &cloudcodev1.ListStorageProfilesResponse{StorageProfiles: f.profiles}, nil
}

func (f *fleet) ListStoredSessions(_ context.Context, req *cloudcodev1.ListStoredSessionsRequest) (*cloudcodev1.ListStoredSessionsResponse, error) {
	if req.GetParent() != "storageProfiles/default" {
		return nil, grpcerr.New(codes.NotFound, "STORAGE_PROFILE_NOT_FOUND", "there is no storage profile %s", idOf(req.GetParent()))
	}
	return &cloudcodev1.ListStoredSessionsResponse{Sessions: f.stored}, nil
}

func (f *fleet) RecoverSessions(_ context.Context, req *cloudcodev1.RecoverSessionsRequest) (*cloudcodev1.RecoverSessionsResponse, error) {
	f.mu.Lock()
	f.recovers = append(f.recovers, proto.CloneOf(req))
	f.mu.Unlock()
	return f.onRecover(req)
}

// local is where the fake fleet has a path of a session.
func (f *fleet) local(path string) string {
	return filepath.Join(f.files, strings.TrimPrefix(path, container.StorageDir))
}

// ReadArchive packs with the system's tar, which knows nothing of our code.
func (f *fleet) ReadArchive(req *cloudcodev1.ReadArchiveRequest, s archiveOut) error {
	f.mu.Lock()
	f.reads = append(f.reads, proto.CloneOf(req))
	f.mu.Unlock()
	if f.onRead != nil {
		return f.onRead(req, s)
	}
	if _, err := f.get(req.GetName()); err != nil {
		return err
	}
	dir, what := f.files, "."
	if req.GetPath() != "" {
		dir, what = filepath.Split(f.local(req.GetPath()))
	}
	if _, err := os.Lstat(filepath.Join(dir, what)); err != nil {
		return grpcerr.New(codes.NotFound, "PATH_NOT_FOUND", "there is no %s", req.GetPath())
	}
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(s.Context(), "tar", "-C", dir, "--format=pax", "-cf", "-", "--", what)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return status.Error(codes.Internal, err.Error()+": "+errOut.String())
	}
	return sendArchive(s, out.Bytes())
}

func sendArchive(s archiveOut, all []byte) error {
	if err := s.Send(&cloudcodev1.ReadArchiveResponse{EstimatedBytes: int64(len(all))}); err != nil {
		return err
	}
	for len(all) > 0 {
		n := min(len(all), 100_001)
		if err := s.Send(&cloudcodev1.ReadArchiveResponse{Data: all[:n]}); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// WriteArchive unpacks with the system's tar, once all has come.
func (f *fleet) WriteArchive(s archiveIn) error {
	if f.onWrite != nil {
		return f.onWrite(s)
	}
	first, data, err := takeArchive(s)
	if err != nil {
		return err
	}
	if _, err := f.get(first.GetName()); err != nil {
		return err
	}
	dir := f.local(first.GetPath())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(s.Context(), "tar", "-C", dir, "-xpvf", "-")
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return grpcerr.New(codes.InvalidArgument, "NOT_AN_ARCHIVE", "%s", out)
	}
	return s.SendAndClose(&cloudcodev1.WriteArchiveResponse{Files: int64(bytes.Count(out, []byte("\n"))), Bytes: int64(len(data))})
}

func takeArchive(s archiveIn) (first *cloudcodev1.WriteArchiveRequest, data []byte, err error) {
	if first, err = s.Recv(); err != nil {
		return nil, nil, err
	}
	for {
		req, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return first, data, nil
		}
		if err != nil {
			return first, data, err
		}
		data = append(data, req.GetData()...)
	}
}

func checkpoints() []*cloudcodev1.Checkpoint {
	return []*cloudcodev1.Checkpoint{
		{
			Id: "20261123t115955.000z-aaaa", CreateTime: ago(5 * time.Second), Trigger: "turn", Files: 3650, Bytes: 63 << 20, UploadedBytes: 12 << 10,
			Node: "nodes/n1", Generation: 3, OpencodeVersion: "1.18.34",
		},
		{
			Id: "20261123t105955.000z-bbbb", CreateTime: ago(time.Hour), Trigger: "manual", Files: 1, Bytes: 100, UploadedBytes: 63 << 20, Node: "nodes/n2",
			Notes: []string{"run/app.sock is a socket\x1b[31m and was left out"},
		},
	}
}

// stored is a session that is kept in object storage.
func stored(id string) *cloudcodev1.Session {
	s := running(id)
	s.Storage = &cloudcodev1.StorageStatus{
		Mode: cloudcodev1.Storage_SNAPSHOT, Persistent: true, Uri: "s3://work/fleet/" + id, Checkpoint: checkpoints()[0],
		MountState: cloudcodev1.StorageStatus_MOUNTED, Mounter: "tigrisfs",
	}
	return s
}

func TestStorageOutput(t *testing.T) {
	f := newFleet(t)
	f.put(stored("kept"))
	outage := stored("outage")
	outage.Storage.UnsavedSince, outage.Storage.Message = ago(5*time.Minute), "object storage answers 503: what was done since is only on n1"
	f.put(outage)
	mount := stored("mount")
	mount.Storage.Mode, mount.Storage.MountState = cloudcodev1.Storage_MOUNT, cloudcodev1.StorageStatus_MOUNT_FAILED
	mount.Storage.Message = "TigrisFS ends with exit code 1"
	f.put(mount)
	fresh := stored("fresh")
	fresh.State, fresh.Storage.Checkpoint = cloudcodev1.Session_STARTING, nil
	f.put(fresh)
	asleep := stored("asleep")
	asleep.State, asleep.Node = cloudcodev1.Session_SUSPENDED, ""
	f.put(asleep)
	saving := stored("saving")
	saving.State = cloudcodev1.Session_SUSPENDING
	saving.Progress = &cloudcodev1.StartProgress{Phase: "checkpoint", Detail: "3 of 7 files", CurrentBytes: 1 << 20, TotalBytes: 4 << 20}
	f.put(saving)
	scratch := running("scratch")
	scratch.Storage = &cloudcodev1.StorageStatus{Mode: cloudcodev1.Storage_LOCAL}
	f.put(scratch)
	f.saved = checkpoints()
	f.profiles = []*cloudcodev1.StorageProfile{
		{Name: "storageProfiles/default", Endpoint: "https://s3.example.com", Bucket: "work", Region: "auto", Prefix: "fleet", AutoMode: cloudcodev1.Storage_SNAPSHOT, Encrypted: true},
		{Name: "storageProfiles/tigris", Endpoint: "https://fly.storage.tigris.dev", Bucket: "b2", Region: "auto", AutoMode: cloudcodev1.Storage_MOUNT},
	}
	for name, args := range map[string][]string{
		"storage_list.table":     {"session", "list"},
		"storage_kept.table":     {"session", "get", "kept"},
		"storage_outage.table":   {"session", "get", "outage"},
		"storage_mount.table":    {"session", "get", "mount"},
		"storage_saving.table":   {"session", "get", "saving"},
		"storage_scratch.table":  {"session", "get", "scratch"},
		"checkpoints.table":      {"session", "checkpoints", "kept"},
		"checkpoints.json":       {"session", "checkpoints", "kept", "-o", "json"},
		"checkpoints.name":       {"session", "checkpoints", "kept", "-o", "name"},
		"storage_profiles.table": {"storage", "profiles"},
		"storage_profiles.json":  {"storage", "profiles", "-o", "json"},
	} {
		t.Run(name, func(t *testing.T) {
			r := f.run(args...)
			if r.code != 0 || r.err != "" || strings.Contains(r.out, "\x1b") {
				t.Fatalf("exit %d, stderr %q, %q", r.code, r.err, r.out)
			}
			golden(t, name, r.out)
		})
	}
	f.profiles[1].Message = "a checkpoint is damaged"
	if r := f.run("storage", "profiles"); r.code != 0 || r.err != "tigris: a checkpoint is damaged\n" || strings.Contains(r.out, "damaged") {
		t.Errorf("%+v", r)
	}
	f.saved, f.profiles = nil, nil
	if r := f.run("session", "checkpoints", "kept"); r.out != "" || !strings.Contains(r.err, "no checkpoints yet") {
		t.Errorf("%+v", r)
	}
	if r := f.run("storage", "profiles"); r.out != "" || !strings.Contains(r.err, "S3_ENDPOINT") {
		t.Errorf("%+v", r)
	}
}

func TestStorageLine(t *testing.T) {
	other := &cloudcodev1.StorageProfile{Name: "storageProfiles/other", Bucket: "x"}
	if have := storageLine([]*cloudcodev1.StorageProfile{other}); !strings.Contains(have, "not persistent") || !strings.Contains(have, "set S3_ENDPOINT, S3_BUCKET") {
		t.Error(have)
	}
	def := &cloudcodev1.StorageProfile{Name: "storageProfiles/default", Bucket: "work", Prefix: "fleet/", Endpoint: "https://s3.example.com"}
	if have := storageLine([]*cloudcodev1.StorageProfile{other, def}); have != "sessions are kept in s3://work/fleet at https://s3.example.com" {
		t.Error(have)
	}
}

func TestCreateWithStorage(t *testing.T) {
	f := newFleet(t)
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte("hush hush\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ours := []string{"--s3-endpoint", "https://s3.example.com", "--s3-bucket", "b", "--s3-access-key-id", "AKID"}
	s3 := func(f func(*cloudcodev1.S3Storage)) *cloudcodev1.Storage {
		s := &cloudcodev1.S3Storage{Endpoint: "https://s3.example.com", Bucket: "b", AccessKeyId: "AKID", SecretAccessKey: "hush hush"}
		if f != nil {
			f(s)
		}
		return &cloudcodev1.Storage{S3: s}
	}
	for _, tc := range []struct {
		name  string
		args  []string
		env   map[string]string
		stdin string
		want  *cloudcodev1.Storage
	}{
		{name: "nothing"},
		{name: "mode", args: []string{"--storage-mode", "Snapshot"}, want: &cloudcodev1.Storage{Mode: cloudcodev1.Storage_SNAPSHOT}},
		{name: "profile and prefix", args: []string{"--storage-profile", "eu", "--storage-prefix", "/a/b/"}, want: &cloudcodev1.Storage{Profile: "eu", Prefix: proto.String("a/b")}},
		{name: "empty prefix", args: []string{"--storage-prefix", ""}, want: &cloudcodev1.Storage{Prefix: proto.String("")}},
		{name: "local", args: []string{"--storage-mode", "local"}, want: &cloudcodev1.Storage{Mode: cloudcodev1.Storage_LOCAL}},
		{name: "key from a file", args: append(ours, "--s3-secret-access-key-file", key), want: s3(nil)},
		{name: "key from stdin", args: append(ours, "--s3-secret-access-key-file", "-"), stdin: "hush hush\n", want: s3(nil)},
		{name: "key from the environment", args: ours, env: map[string]string{"SESSION_S3_SECRET_ACCESS_KEY": "hush hush"}, want: s3(nil)},
		{
			name: "all from the environment", env: map[string]string{
				"SESSION_S3_ENDPOINT": "https://s3.example.com", "SESSION_S3_BUCKET": "b", "SESSION_S3_ACCESS_KEY_ID": "AKID", "SESSION_S3_SECRET_ACCESS_KEY": "hush hush",
				"SESSION_S3_REGION": "eu-1", "SESSION_S3_PATH_STYLE": "true", "SESSION_S3_PREFIX": "p", "SESSION_TIGRISFS_ARGS": "--no-x",
			},
			want: s3(func(s *cloudcodev1.S3Storage) {
				s.Region, s.PathStyle, s.Prefix, s.TigrisfsArgs = "eu-1", true, "p", "--no-x"
			}),
		},
		{name: "the server's variables are not ours", env: map[string]string{"S3_ENDPOINT": "https://x", "S3_BUCKET": "x", "S3_ACCESS_KEY_ID": "x", "S3_SECRET_ACCESS_KEY": "x"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for k, v := range tc.env {
				t.Setenv(k, v)
			}
			f.creates = nil
			r := f.runWith(invocation{stdin: strings.NewReader(tc.stdin)}, append([]string{"session", "create", "main"}, tc.args...)...)
			if r.code != 0 || len(f.creates) != 1 {
				t.Fatalf("%+v", r)
			}
			if have := f.creates[0].GetSession().GetSpec().GetStorage(); !proto.Equal(have, tc.want) {
				t.Errorf("sent %v, want %v", have, tc.want)
			}
			if strings.Contains(r.out+r.err, "hush") {
				t.Error("the key is shown")
			}
		})
	}
	f.creates = nil
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"--storage-mode", "fast"}, "want auto, local, mount or snapshot"},
		{[]string{"--s3-bucket", "b"}, "also needs --s3-endpoint, --s3-access-key-id, --s3-secret-access-key-file (or $SESSION_S3_SECRET_ACCESS_KEY)"},
		{[]string{"--tigrisfs-args", "x"}, "also needs --s3-endpoint, --s3-bucket"},
		{append(ours, "--storage-profile", "eu"), "give one of them"},
		{[]string{"--storage-mode", "local", "--storage-prefix", ""}, "takes no profile"},
		{append(ours, "--s3-secret-access-key-file", "/does/not/exist"), "no such file"},
		{append(ours, "--s3-secret-access-key-file", "-"), "no key on stdin"},
		{append(ours, "--s3-secret-access-key", "hush"), "unknown flag"},
	} {
		r := f.run(append([]string{"session", "create", "main"}, tc.args...)...)
		if r.code != exitUsage || !strings.Contains(r.err, tc.want) {
			t.Errorf("%q: exit %d, %s", tc.args, r.code, r.err)
		}
	}
	if len(f.creates) != 0 {
		t.Errorf("%d requests were sent", len(f.creates))
	}
}

func TestUpdateKeys(t *testing.T) {
	f := newFleet(t)
	f.put(stored("main"))
	own := stored("own")
	own.Spec.Storage = &cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{Bucket: "b", AccessKeyId: "old"}}
	f.put(own)
	// What is there for creates changes nothing that is.
	t.Setenv("SESSION_S3_ACCESS_KEY_ID", "of the environment")
	t.Setenv("SESSION_S3_SECRET_ACCESS_KEY", "of the environment")
	r := f.runWith(invocation{stdin: strings.NewReader("hush\n")}, "session", "update", "own", "--s3-access-key-id", "new", "--s3-secret-access-key-file", "-")
	if r.code != 0 || strings.Contains(r.out+r.err, "hush") {
		t.Fatalf("%+v", r)
	}
	s3, mask := f.updates[0].GetSession().GetSpec().GetStorage().GetS3(), strings.Join(f.updates[0].GetUpdateMask().GetPaths(), " ")
	if s3.GetAccessKeyId() != "new" || s3.GetSecretAccessKey() != "hush" || mask != "spec.storage.s3.access_key_id spec.storage.s3.secret_access_key" {
		t.Errorf("sent %v, %s", s3, mask)
	}
	if r := f.run("session", "update", "own", "--pids", "7"); r.code != 0 || f.updates[1].GetSession().GetSpec().GetStorage().GetS3().GetSecretAccessKey() == "of the environment" {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "update", "main", "--s3-access-key-id", "new"); r.code != exitUsage || !strings.Contains(r.err, "no bucket of its own") {
		t.Errorf("%+v", r)
	}
}

// later moves a session on for those who watch it, once the call is answered.
func (f *fleet) later(steps ...*cloudcodev1.Session) {
	f.onWatch = func(_ *cloudcodev1.WatchSessionEventsRequest, s eventStream) error {
		for _, step := range steps {
			f.put(step)
			if err := s.Send(lifecycle("", step)); err != nil {
				return err
			}
		}
		<-s.Context().Done()
		return nil
	}
}

// moved is a session a moment after from.
func moved(from *cloudcodev1.Session, seconds int, state cloudcodev1.Session_State, change func(*cloudcodev1.Session)) *cloudcodev1.Session {
	s := proto.CloneOf(from)
	s.State, s.UpdateTime = state, at(time.Duration(seconds)*time.Second)
	if change != nil {
		change(s)
	}
	return s
}

func TestSuspend(t *testing.T) {
	f := newFleet(t)
	main := stored("main")
	f.put(main)
	f.onSuspend = func(s *cloudcodev1.Session) (*cloudcodev1.Session, error) {
		return moved(s, 1, cloudcodev1.Session_SUSPENDING, nil), nil
	}
	if r := f.run("session", "suspend", "main"); r.code != 0 || r.out != "session main is being suspended\n" || r.err != "" {
		t.Errorf("%+v", r)
	}
	f.put(main)
	f.later(
		moved(main, 2, cloudcodev1.Session_SUSPENDING, func(s *cloudcodev1.Session) {
			s.Progress = &cloudcodev1.StartProgress{Phase: "checkpoint", Detail: "3 of 7 files"}
		}),
		moved(main, 3, cloudcodev1.Session_SUSPENDED, func(s *cloudcodev1.Session) { s.Node = "" }),
	)
	r := f.run("session", "suspend", "main", "--wait")
	if r.code != 0 || r.out != "session main suspended\n" || !strings.Contains(r.err, "stopping\nsaving: 3 of 7 files\nsuspended after 0.0s\n") {
		t.Errorf("%+v", r)
	}
	f.put(main)
	if r := f.run("session", "suspend", "main", "--wait", "-o", "json"); r.code != 0 || !strings.Contains(r.out, `"state": "SUSPENDED"`) || r.err != "" {
		t.Errorf("%+v", r)
	}

	f.put(main)
	f.later(moved(main, 2, cloudcodev1.Session_LOST, func(s *cloudcodev1.Session) { s.Reason = "NODE_UNREACHABLE" }))
	if r := f.run("session", "suspend", "main", "--wait"); r.code != exitFailed || !strings.Contains(r.err, "was not suspended: it is LOST: NODE_UNREACHABLE") {
		t.Errorf("%+v", r)
	}
	f.put(main)
	f.later()
	if r := f.run("session", "suspend", "main", "--wait", "--timeout", "50ms"); r.code != exitTimeout || !strings.Contains(r.err, "is not suspended after 50ms") {
		t.Errorf("%+v", r)
	}
	f.onSuspend = func(*cloudcodev1.Session) (*cloudcodev1.Session, error) {
		return nil, grpcerr.New(codes.FailedPrecondition, "SESSION_LOST", "session main is LOST")
	}
	if r := f.run("session", "suspend", "main"); r.code != exitConflict {
		t.Errorf("%+v", r)
	}
}

func TestResume(t *testing.T) {
	f := newFleet(t)
	asleep := moved(stored("main"), 0, cloudcodev1.Session_SUSPENDED, nil)
	f.put(asleep)
	f.onResume = func(s *cloudcodev1.Session) (*cloudcodev1.Session, error) {
		return moved(s, 1, cloudcodev1.Session_PENDING, nil), nil
	}
	if r := f.run("session", "resume", "main"); r.code != 0 || r.out != "session main is being resumed\n" {
		t.Errorf("%+v", r)
	}
	steps := []*cloudcodev1.Session{
		moved(asleep, 2, cloudcodev1.Session_STARTING, func(s *cloudcodev1.Session) {
			s.Node, s.Progress = "nodes/n2", &cloudcodev1.StartProgress{Phase: "restore", Detail: "12 of 3650 files", CurrentBytes: 1, TotalBytes: 3}
		}),
		moved(asleep, 3, cloudcodev1.Session_STARTING, func(s *cloudcodev1.Session) {
			s.Node, s.Progress = "nodes/n2", &cloudcodev1.StartProgress{Phase: "mount"}
		}),
		moved(asleep, 4, cloudcodev1.Session_RUNNING, func(s *cloudcodev1.Session) { s.Node = "nodes/n2" }),
	}
	f.put(asleep)
	f.later(steps...)
	r := f.run("session", "resume", "main", "--wait")
	if r.code != 0 || !strings.HasPrefix(r.out, "session main is ready\n") || !strings.Contains(r.err, "placed on n2\nrestore: 12 of 3650 files\nmount\nready after") {
		t.Errorf("%+v", r)
	}
	// A server that does not move it at once is no failure, one that gives up is.
	f.onResume = func(s *cloudcodev1.Session) (*cloudcodev1.Session, error) { return s, nil }
	f.put(asleep)
	if r := f.run("session", "resume", "main", "--wait"); r.code != 0 {
		t.Errorf("%+v", r)
	}
	f.put(asleep)
	f.later(steps[0], moved(asleep, 5, cloudcodev1.Session_SUSPENDED, nil))
	if r := f.run("session", "resume", "main", "--wait"); r.code != exitFailed || !strings.Contains(r.err, "session main is SUSPENDED") || !strings.Contains(r.err, "cloudcode session resume main") {
		t.Errorf("%+v", r)
	}
	f.put(stored("main"))
	if r := f.run("session", "resume", "main"); r.code != 0 || r.out != "session main runs\n" {
		t.Errorf("%+v", r)
	}
}

func TestCheckpoint(t *testing.T) {
	f := newFleet(t)
	f.put(stored("main"))
	f.saved = checkpoints()
	r := f.run("session", "checkpoint", "main")
	if want := "session main saved: 20261123t115955.000z-aaaa, 63 MiB in 3650 files, 12 KiB sent (turn)\n"; r.code != 0 || r.out != want {
		t.Errorf("%+v", r)
	}
	f.saved = f.saved[1:]
	if r := f.run("session", "checkpoint", "main"); !strings.Contains(r.err, "note: run/app.sock is a socket and was left out\n") {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "checkpoint", "main", "-o", "name"); r.out != "20261123t105955.000z-bbbb\n" || r.err != "" {
		t.Errorf("%+v", r)
	}
	// On a terminal it spins, and leaves nothing of that behind.
	out := &terminalOut{}
	if r := f.runWith(invocation{errOut: out}, "session", "checkpoint", "main", "-o", "name"); r.code != 0 || !strings.Contains(out.String(), "saving main") || !strings.HasSuffix(out.String(), "\r\x1b[K") {
		t.Errorf("%+v, %q", r, out.String())
	}
	if r := f.run("session", "checkpoint", "nobody"); r.code != exitNotFound {
		t.Errorf("%+v", r)
	}
}

func TestRestore(t *testing.T) {
	f := newFleet(t)
	main := stored("main")
	ask := func(answer string, args ...string) result {
		f.put(main)
		return f.runWith(invocation{stdin: terminal{Reader: strings.NewReader(answer)}}, append([]string{"session", "restore", "main", "--at", "2026"}, args...)...)
	}
	starting := moved(main, 1, cloudcodev1.Session_STARTING, nil)
	f.onRestore = func(*cloudcodev1.RestoreSessionRequest) (*cloudcodev1.Session, error) {
		f.put(starting)
		return starting, nil
	}
	if r := ask("n\n"); r.code != exitError || !strings.Contains(r.err, "Take session main back to checkpoint 2026?") || !strings.Contains(r.err, "nothing was restored") || len(f.restores) != 0 {
		t.Errorf("%+v", r)
	}
	if r := ask("y\n"); r.code != 0 || r.out != "session main is being restored\n" || len(f.restores) != 1 || f.restores[0].GetCheckpoint() != "2026" {
		t.Errorf("%+v, %v", r, f.restores)
	}
	f.put(main)
	if r := f.run("session", "restore", "main", "--at", "2026"); r.code != exitUsage || !strings.Contains(r.err, "add --yes") || len(f.restores) != 1 {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "restore", "main", "--yes"); r.code != exitUsage || !strings.Contains(r.err, `"at"`) {
		t.Errorf("%+v", r)
	}
	// The old generation, which still runs for a moment, is not taken for the new one.
	f.put(main)
	f.later(
		moved(main, 2, cloudcodev1.Session_RUNNING, nil),
		moved(main, 3, cloudcodev1.Session_STARTING, func(s *cloudcodev1.Session) {
			s.Generation, s.Progress = 4, &cloudcodev1.StartProgress{Phase: "restore", Detail: "going back"}
		}),
		moved(main, 4, cloudcodev1.Session_RUNNING, func(s *cloudcodev1.Session) { s.Generation = 4 }),
	)
	r := f.run("session", "restore", "main", "--at", "2026", "-y", "--wait", "-o", "json")
	if r.code != 0 || !strings.Contains(r.out, `"generation": "4"`) {
		t.Errorf("%+v", r)
	}
}

func TestFork(t *testing.T) {
	f := newFleet(t)
	f.put(stored("main"))
	f.onFork = func(req *cloudcodev1.ForkSessionRequest) (*cloudcodev1.Session, error) {
		if len(f.forks) == 1 {
			return nil, status.Error(codes.Unavailable, "the server is stopping")
		}
		s := stored("made-up")
		if id := req.GetSessionId(); id != "" {
			s = stored(id)
		}
		f.put(s)
		return s, nil
	}
	r := f.run("session", "fork", "main", "try-it", "--at", "2026")
	if r.code != 0 || r.out != "session try-it created\n" {
		t.Fatalf("%+v", r)
	}
	// The first answer was lost.
	a, b := f.forks[0], f.forks[1]
	if !proto.Equal(a, b) || len(a.GetRequestId()) != 36 || a.GetName() != "sessions/main" || a.GetSessionId() != "try-it" || a.GetCheckpoint() != "2026" {
		t.Errorf("%v, then %v", a, b)
	}
	if r := f.run("session", "fork", "main", "--wait"); r.code != 0 || !strings.HasPrefix(r.out, "session made-up is ready\n") {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "fork", "main", "a", "b"); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
}

func TestRecover(t *testing.T) {
	f := newFleet(t)
	f.stored = []*cloudcodev1.StoredSession{
		{SessionId: "main", Prefix: "main", Mode: cloudcodev1.Storage_SNAPSHOT, Checkpoint: checkpoints()[0]},
		{SessionId: "here", Prefix: "here", Mode: cloudcodev1.Storage_SNAPSHOT, Checkpoint: checkpoints()[1], Known: true},
		{SessionId: "old", Prefix: "", Mode: cloudcodev1.Storage_MOUNT, Checkpoint: checkpoints()[1], DeleteTime: ago(48 * time.Hour)},
		{SessionId: "broken", Message: "the manifest is truncated\x1b[31m"},
	}
	r := f.run("session", "recover", "--dry-run")
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	golden(t, "recover_dry_run.table", r.out)
	if r := f.run("session", "recover", "--dry-run", "old", "-o", "name"); r.out != "old\n" {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "recover", "--dry-run", "--profile", "nope"); r.code != exitNotFound || !strings.Contains(r.err, "cloudcode storage profiles") {
		t.Errorf("%+v", r)
	}
	if len(f.recovers) != 0 {
		t.Error("a dry run has recovered")
	}
	f.onRecover = func(req *cloudcodev1.RecoverSessionsRequest) (*cloudcodev1.RecoverSessionsResponse, error) {
		return &cloudcodev1.RecoverSessionsResponse{
			Sessions: []*cloudcodev1.Session{stored("main")},
			Failures: []*cloudcodev1.RecoverFailure{{SessionId: "broken", Reason: "CHECKPOINT_DAMAGED", Message: "the manifest is truncated"}},
		}, nil
	}
	r = f.run("session", "recover")
	if r.code != exitError || r.out != "session main recovered\n" || !strings.Contains(r.err, "session broken was not recovered: the manifest is truncated") {
		t.Errorf("%+v", r)
	}
	f.onRecover = func(*cloudcodev1.RecoverSessionsRequest) (*cloudcodev1.RecoverSessionsResponse, error) {
		return &cloudcodev1.RecoverSessionsResponse{}, nil
	}
	if r := f.run("session", "recover", "sessions/main", "old"); r.code != 0 || !strings.Contains(r.err, "nothing to recover") {
		t.Errorf("%+v", r)
	}
	if have := f.recovers[1]; have.GetParent() != "storageProfiles/default" || strings.Join(have.GetSessionIds(), " ") != "main old" {
		t.Errorf("asked %v", have)
	}
}

func TestDeletePurge(t *testing.T) {
	f := newFleet(t)
	ask := func(answer string, args ...string) result {
		f.put(stored("main"))
		return f.runWith(invocation{stdin: terminal{Reader: strings.NewReader(answer)}}, append([]string{"session", "delete", "main"}, args...)...)
	}
	if r := ask("n\n"); !strings.Contains(r.err, "Delete session main? What is stored of it in s3://work/fleet/main stays; --purge removes that, too. [y/N]") || len(f.deletes) != 0 {
		t.Errorf("%+v", r)
	}
	if r := ask("n\n", "--purge"); !strings.Contains(r.err, "Delete session main and its workspace, with everything that is stored of it in s3://work/fleet/main? This cannot be undone. [y/N]") || len(f.deletes) != 0 {
		t.Errorf("%+v", r)
	}
	if r := ask("y\n"); r.code != 0 || f.deletes[0].GetPurgeStorage() {
		t.Errorf("%+v", r)
	}
	if r := ask("y\n", "--purge"); r.code != 0 || !f.deletes[1].GetPurgeStorage() {
		t.Errorf("%+v", r)
	}
	// Not from the environment: that would be too easy to forget.
	t.Setenv("CLOUDCODE_PURGE", "true")
	if r := ask("y\n"); r.code != 0 || f.deletes[2].GetPurgeStorage() {
		t.Errorf("%+v", r)
	}
}

func TestCheckpointedEvent(t *testing.T) {
	f := newFleet(t)
	f.put(stored("main"))
	f.onWatch = func(_ *cloudcodev1.WatchSessionEventsRequest, s eventStream) error {
		return send(s, heartbeat("3-0"), &cloudcodev1.SessionEvent{
			Id: "3-1", Time: at(0), Event: &cloudcodev1.SessionEvent_Checkpointed{Checkpointed: &cloudcodev1.CheckpointedEvent{Checkpoint: checkpoints()[0]}},
		}, end("DELETED"))
	}
	r := f.run("session", "events", "main", "--type", "checkpointed")
	if want := regexp.MustCompile(`^12:00:00\.000 +3-1 +checkpointed +20261123t115955\.000z-aaaa, 63 MiB in 3650 files, 12 KiB sent \(turn\)\n$`); !want.MatchString(r.out) {
		t.Errorf("%+v", r)
	}
}

func TestStorageCompletion(t *testing.T) {
	f := newFleet(t)
	f.put(stored("main"))
	f.saved = checkpoints()
	f.profiles = []*cloudcodev1.StorageProfile{{Name: "storageProfiles/default", Bucket: "work"}}
	t.Setenv("CLOUDCODE_DATA_DIR", f.dir)
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"session", "restore", "main", "--at", ""}, "20261123t115955.000z-aaaa\t5s ago, turn\n20261123t105955.000z-bbbb\t60m ago, manual\n:36\n"},
		{[]string{"session", "fork", "main", "--at", ""}, "20261123t115955.000z-aaaa\t5s ago, turn\n20261123t105955.000z-bbbb\t60m ago, manual\n:36\n"},
		{[]string{"session", "cp", "main:x", "--at", ""}, "20261123t115955.000z-aaaa\t5s ago, turn\n20261123t105955.000z-bbbb\t60m ago, manual\n:36\n"},
		{[]string{"session", "restore", "--at", ""}, ":4\n"},
		{[]string{"session", "suspend", ""}, "main\tRUNNING\n:4\n"},
		{[]string{"session", "cp", "m"}, "main:\tRUNNING\n:2\n"},
		{[]string{"session", "cp", "./"}, ":0\n"},
		{[]string{"session", "recover", "--profile", ""}, "default\ts3://work\n:4\n"},
		{[]string{"session", "create", "--storage-profile", ""}, "default\ts3://work\n:4\n"},
		{[]string{"session", "create", "--storage-mode", ""}, "auto\nlocal\nmount\nsnapshot\n:4\n"},
	} {
		r := invocation{}.run(t, append([]string{"__complete"}, tc.args...)...)
		if r.code != 0 || r.out != tc.want {
			t.Errorf("%q: %q, %s", tc.args, r.out, r.err)
		}
	}
}
