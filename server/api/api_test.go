package api

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is the API over a real store and real gRPC.
type fixture struct {
	cloudcodev1.SessionServiceClient
	nodes    cloudcodev1.NodeServiceClient
	storages cloudcodev1.StorageServiceClient
	store    store.Store
}

func newFixture(t *testing.T, change func(*Config)) *fixture {
	t.Helper()
	db, err := boltstore.Open(filepath.Join(t.TempDir(), "fleet.db"))
	if err != nil {
		t.Fatal(err)
	}
	config := Config{Store: db, DefaultImage: "default:1", WebURI: func(id string) string { return "http://" + id + ".localhost" }}
	if change != nil {
		change(&config)
	}
	log := slog.New(slog.DiscardHandler)
	server := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			resp, err := h(ctx, req)
			return resp, Status(ctx, log, err)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			return Status(ss.Context(), log, h(srv, ss))
		}))
	sessions, nodes, storages := New(config)
	cloudcodev1.RegisterSessionServiceServer(server, sessions)
	cloudcodev1.RegisterNodeServiceServer(server, nodes)
	cloudcodev1.RegisterStorageServiceServer(server, storages)
	listener := bufconn.Listen(1 << 20)
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(listener) })
	conn, err := grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		wg.Wait()
		_ = db.Close()
	})
	return &fixture{
		cloudcodev1.NewSessionServiceClient(conn), cloudcodev1.NewNodeServiceClient(conn), cloudcodev1.NewStorageServiceClient(conn), db,
	}
}

func (f *fixture) create(t *testing.T, id string, change func(*cloudcodev1.Session)) *cloudcodev1.Session {
	t.Helper()
	in := &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{}}
	if change != nil {
		change(in)
	}
	s, err := f.CreateSession(t.Context(), &cloudcodev1.CreateSessionRequest{SessionId: id, Session: in})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// edit changes what is stored, as the rest of the server does.
func (f *fixture) edit(t *testing.T, id string, change func(*fleet.Session)) {
	t.Helper()
	if _, err := f.store.Update(t.Context(), func(tx store.Tx) error {
		s, err := tx.Session(id)
		if err != nil {
			return err
		}
		change(s)
		return tx.PutSession(s)
	}); err != nil {
		t.Fatal(err)
	}
}

func place(s *fleet.Session) {
	s.State, s.Generation = fleet.StateRunning, 1
	s.Assignment = &fleet.Assignment{Node: "n1", Generation: 1, Spec: s.Spec.Clone(), Password: "hunter2"}
}

func wantErr(t *testing.T, what string, err error, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code || grpcerr.Reason(err) != reason {
		t.Errorf("%s: %v with reason %q, want %s with %s", what, err, grpcerr.Reason(err), code, reason)
	}
}

func TestCreateGetList(t *testing.T) {
	f := newFixture(t, nil)
	made := f.create(t, "main", func(s *cloudcodev1.Session) {
		s.Labels = map[string]string{"team": "web"}
		s.Spec.Env = map[string]string{"KEY": "value"}
	})
	if made.GetName() != "sessions/main" || made.GetState() != cloudcodev1.Session_PENDING || made.GetSpec().GetImage() != "default:1" ||
		made.GetEtag() == "" || made.GetWebUri() != "http://main.localhost" || uuid.Validate(made.GetUid()) != nil || made.GetMessage() == "" {
		t.Errorf("made %v", made)
	}
	got, err := f.GetSession(t.Context(), &cloudcodev1.GetSessionRequest{Name: "sessions/main"})
	if err != nil || !proto.Equal(got, made) {
		t.Errorf("got %v, %v", got, err)
	}
	_, err = f.CreateSession(t.Context(), &cloudcodev1.CreateSessionRequest{SessionId: "main", Session: &cloudcodev1.Session{}})
	wantErr(t, "same id", err, codes.AlreadyExists, "SESSION_EXISTS")
	_, err = f.GetSession(t.Context(), &cloudcodev1.GetSessionRequest{Name: "sessions/other"})
	wantErr(t, "unknown", err, codes.NotFound, "SESSION_NOT_FOUND")
	_, err = f.GetSession(t.Context(), &cloudcodev1.GetSessionRequest{Name: "main"})
	wantErr(t, "bad name", err, codes.InvalidArgument, "INVALID_FIELDS")

	ids := map[string]bool{}
	for range 50 {
		s := f.create(t, "", nil)
		id := strings.TrimPrefix(s.GetName(), "sessions/")
		var v violations
		if validateID(&v, id); len(v) > 0 || ids[id] {
			t.Errorf("generated id %q: %v", id, v)
		}
		ids[id] = true
	}
	n, token := 0, ""
	var last string
	for {
		resp, err := f.ListSessions(t.Context(), &cloudcodev1.ListSessionsRequest{PageSize: 20, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range resp.GetSessions() {
			if s.GetName() <= last {
				t.Errorf("%s after %s", s.GetName(), last)
			}
			last = s.GetName()
			n++
		}
		if token = resp.GetNextPageToken(); token == "" {
			break
		}
	}
	if n != 51 {
		t.Errorf("listed %d", n)
	}
	resp, err := f.ListSessions(t.Context(), &cloudcodev1.ListSessionsRequest{PageSize: 51})
	if err != nil || resp.GetNextPageToken() != "" || len(resp.GetSessions()) != 51 {
		t.Errorf("exactly one page: %d and token %q", len(resp.GetSessions()), resp.GetNextPageToken())
	}
	resp, _ = f.ListSessions(t.Context(), &cloudcodev1.ListSessionsRequest{PageSize: 1})
	for what, req := range map[string]*cloudcodev1.ListSessionsRequest{
		"another filter": {PageToken: resp.GetNextPageToken(), Filter: "state = RUNNING"},
		"no token":       {PageToken: "abc"},
		"negative":       {PageSize: -1},
		"bad filter":     {Filter: "state ="},
	} {
		_, err := f.ListSessions(t.Context(), req)
		wantErr(t, what, err, codes.InvalidArgument, "INVALID_FIELDS")
	}
}

func TestLargeSessionsMakeShortPages(t *testing.T) {
	f := newFixture(t, nil)
	const n = 20
	for i := range n {
		f.create(t, fmt.Sprintf("s%02d", i), func(s *cloudcodev1.Session) {
			s.Spec.Env = map[string]string{"A": strings.Repeat("x", 250<<10)}
		})
	}
	got, pages := 0, 0
	for token := ""; ; pages++ {
		resp, err := f.ListSessions(t.Context(), &cloudcodev1.ListSessionsRequest{PageToken: token})
		if err != nil {
			t.Fatal(err) // gRPC refuses what is larger than 4 MB
		}
		got += len(resp.GetSessions())
		if token = resp.GetNextPageToken(); token == "" {
			break
		}
	}
	if got != n || pages < 2 {
		t.Errorf("%d sessions on %d pages", got, pages+1)
	}
}

func TestRequestID(t *testing.T) {
	f := newFixture(t, nil)
	req := &cloudcodev1.CreateSessionRequest{
		RequestId: "6BA7B810-9dad-41d1-80b4-00c04fd430c8",
		Session:   &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Env: map[string]string{"A": "1", "B": "2", "C": "3"}}},
	}
	var mu sync.Mutex
	names := map[string]bool{}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			s, err := f.CreateSession(t.Context(), req)
			mu.Lock()
			defer mu.Unlock()
			names[s.GetName()] = true
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(names) != 1 {
		t.Fatalf("one request made %v", names)
	}
	other := proto.CloneOf(req)
	other.RequestId = strings.ToLower(req.GetRequestId())
	other.Session.Labels = map[string]string{"a": "b"}
	_, err := f.CreateSession(t.Context(), other)
	wantErr(t, "another request", err, codes.InvalidArgument, "REQUEST_ID_REUSED")
	for name := range names {
		if _, err := f.store.Update(t.Context(), func(tx store.Tx) error { return tx.DeleteSession(strings.TrimPrefix(name, "sessions/")) }); err != nil {
			t.Fatal(err)
		}
	}
	_, err = f.CreateSession(t.Context(), req)
	wantErr(t, "after it was deleted", err, codes.AlreadyExists, "REQUEST_ID_SPENT")
}

func TestValidation(t *testing.T) {
	f := newFixture(t, nil)
	big := strings.Repeat("x", 300<<10)
	for name, c := range map[string]struct {
		req  *cloudcodev1.CreateSessionRequest
		spec *cloudcodev1.SessionSpec
		want []string // fields; nil: it is fine
	}{
		"upper case":         {req: &cloudcodev1.CreateSessionRequest{SessionId: "Main"}, want: []string{"session_id"}},
		"two hyphens":        {req: &cloudcodev1.CreateSessionRequest{SessionId: "a--b"}, want: []string{"session_id"}},
		"digit first":        {req: &cloudcodev1.CreateSessionRequest{SessionId: "1a"}, want: []string{"session_id"}},
		"hyphen last":        {req: &cloudcodev1.CreateSessionRequest{SessionId: "a-"}, want: []string{"session_id"}},
		"41 characters":      {req: &cloudcodev1.CreateSessionRequest{SessionId: strings.Repeat("a", 41)}, want: []string{"session_id"}},
		"40 characters":      {req: &cloudcodev1.CreateSessionRequest{SessionId: strings.Repeat("a", 40)}},
		"one letter":         {req: &cloudcodev1.CreateSessionRequest{SessionId: "a"}},
		"path":               {req: &cloudcodev1.CreateSessionRequest{SessionId: "../x"}, want: []string{"session_id"}},
		"request id":         {req: &cloudcodev1.CreateSessionRequest{RequestId: "1"}, want: []string{"request_id"}},
		"image":              {spec: &cloudcodev1.SessionSpec{Image: "UPPER CASE"}, want: []string{"session.spec.image"}},
		"good image":         {spec: &cloudcodev1.SessionSpec{Image: "ghcr.io/me/agent:1@sha256:" + strings.Repeat("a", 64)}},
		"local image":        {spec: &cloudcodev1.SessionSpec{Image: "localhost/cloudcode/opencode:1.18.34"}},
		"env name":           {spec: &cloudcodev1.SessionSpec{Env: map[string]string{"A-B": "", "1A": "", "": ""}}, want: []string{`session.spec.env[""]`, `session.spec.env["1A"]`, `session.spec.env["A-B"]`}},
		"reserved env":       {spec: &cloudcodev1.SessionSpec{Env: map[string]string{"HOME": "/", "XDG_DATA_HOME": "/", "OPENCODE_SERVER_PASSWORD": "x", "PORT": "1"}}, want: []string{`session.spec.env["HOME"]`, `session.spec.env["OPENCODE_SERVER_PASSWORD"]`, `session.spec.env["PORT"]`, `session.spec.env["XDG_DATA_HOME"]`}},
		"NUL":                {spec: &cloudcodev1.SessionSpec{Env: map[string]string{"A": "a\x00b"}}, want: []string{`session.spec.env["A"]`}},
		"large env":          {spec: &cloudcodev1.SessionSpec{Env: map[string]string{"A": big}}, want: []string{"session.spec.env"}},
		"config":             {spec: &cloudcodev1.SessionSpec{OpencodeConfig: "{"}, want: []string{"session.spec.opencode_config"}},
		"config is a list":   {spec: &cloudcodev1.SessionSpec{OpencodeConfig: "[]"}, want: []string{"session.spec.opencode_config"}},
		"config is null":     {spec: &cloudcodev1.SessionSpec{OpencodeConfig: "null"}, want: []string{"session.spec.opencode_config"}},
		"large config":       {spec: &cloudcodev1.SessionSpec{OpencodeConfig: `{"a":"` + big + `"}`}, want: []string{"session.spec.opencode_config"}},
		"good config":        {spec: &cloudcodev1.SessionSpec{OpencodeConfig: `{"model":"a/b"}`}},
		"negative":           {spec: &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{CpuMillis: -1, MemoryBytes: -1, Pids: -1, DiskBytes: -1}}, want: []string{"session.spec.resources.cpu_millis", "session.spec.resources.memory_bytes", "session.spec.resources.pids", "session.spec.resources.disk_bytes"}},
		"too little":         {spec: &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{CpuMillis: 1, MemoryBytes: 64 << 20, Pids: 5, DiskBytes: 1 << 20}}, want: []string{"session.spec.resources.cpu_millis", "session.spec.resources.memory_bytes", "session.spec.resources.pids", "session.spec.resources.disk_bytes"}},
		"too much":           {spec: &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{CpuMillis: 1 << 40, MemoryBytes: 1 << 60, Pids: 1 << 40, DiskBytes: 1 << 60}}, want: []string{"session.spec.resources.cpu_millis", "session.spec.resources.memory_bytes", "session.spec.resources.pids", "session.spec.resources.disk_bytes"}},
		"sensible":           {spec: &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{CpuMillis: 500, MemoryBytes: 1 << 30, Pids: 512, DiskBytes: 1 << 30}}},
		"selector":           {spec: &cloudcodev1.SessionSpec{NodeSelector: map[string]string{"a b": "c"}}, want: []string{`session.spec.node_selector["a b"]`}},
		"everything at once": {req: &cloudcodev1.CreateSessionRequest{SessionId: "A"}, spec: &cloudcodev1.SessionSpec{Image: " ", OpencodeConfig: "x"}, want: []string{"session_id", "session.spec.image", "session.spec.opencode_config"}},
	} {
		t.Run(name, func(t *testing.T) {
			req := c.req
			if req == nil {
				req = &cloudcodev1.CreateSessionRequest{}
			}
			req.Session = &cloudcodev1.Session{Spec: c.spec}
			_, err := f.CreateSession(t.Context(), req)
			if c.want == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantErr(t, name, err, codes.InvalidArgument, "INVALID_FIELDS")
			var got []string
			for _, d := range status.Convert(err).Details() {
				if bad, ok := d.(*errdetails.BadRequest); ok {
					for _, v := range bad.GetFieldViolations() {
						got = append(got, v.GetField())
						if len(v.GetDescription()) < 15 || len(v.GetDescription()) > 400 || !strings.Contains(err.Error(), v.GetDescription()) {
							t.Errorf("%s: %q", v.GetField(), v.GetDescription())
						}
					}
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("violations %q, want %q", got, c.want)
			}
		})
	}
}

func TestLabels(t *testing.T) {
	many := map[string]string{}
	for i := range 65 {
		many[fmt.Sprintf("l%d", i)] = ""
	}
	for name, c := range map[string]struct {
		labels map[string]string
		ok     bool
	}{
		"plain":        {map[string]string{"team": "web", "a.b_c-d": "", "app.kubernetes.io/name": "x"}, true},
		"63":           {map[string]string{strings.Repeat("k", 63): strings.Repeat("v", 63)}, true},
		"64":           {map[string]string{strings.Repeat("k", 64): ""}, false},
		"long value":   {map[string]string{"k": strings.Repeat("v", 64)}, false},
		"bad prefix":   {map[string]string{"UPPER/name": ""}, false},
		"empty name":   {map[string]string{"prefix/": ""}, false},
		"empty prefix": {map[string]string{"/name": ""}, false},
		"two slashes":  {map[string]string{"a/b/c": ""}, false},
		"bad value":    {map[string]string{"k": "-v"}, false},
		"65 of them":   {many, false},
	} {
		var v violations
		validateLabels(&v, "labels", c.labels)
		if (len(v) == 0) != c.ok {
			t.Errorf("%s: %v", name, v)
		}
	}
}

func TestUpdate(t *testing.T) {
	f := newFixture(t, nil)
	made := f.create(t, "a", func(s *cloudcodev1.Session) {
		s.Labels = map[string]string{"team": "web"}
		s.Spec = &cloudcodev1.SessionSpec{
			Env: map[string]string{"A": "1"}, Resources: &cloudcodev1.Resources{MemoryBytes: 1 << 30, DiskBytes: 1 << 30},
		}
	})
	f.edit(t, "a", place)
	update := func(sess *cloudcodev1.Session, mask ...string) (*cloudcodev1.Session, error) {
		sess.Name = "sessions/a"
		req := &cloudcodev1.UpdateSessionRequest{Session: sess}
		if mask != nil {
			req.UpdateMask = &fieldmaskpb.FieldMask{Paths: mask}
		}
		return f.UpdateSession(t.Context(), req)
	}
	got, err := update(&cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{MemoryBytes: 2 << 30}}}, "spec.resources.memory_bytes")
	if err != nil {
		t.Fatal(err)
	}
	if r := got.GetSpec().GetResources(); r.GetMemoryBytes() != 2<<30 || r.GetDiskBytes() != 1<<30 || got.GetLabels()["team"] != "web" || got.GetSpec().GetEnv()["A"] != "1" {
		t.Errorf("only memory was to change: %v", got)
	}
	if got.GetEtag() == made.GetEtag() {
		t.Error("etag stays")
	}
	// Without a mask what is set changes, and only that.
	got, err = update(&cloudcodev1.Session{Labels: map[string]string{"team": "db"}})
	if err != nil || got.GetLabels()["team"] != "db" || got.GetSpec().GetEnv()["A"] != "1" {
		t.Errorf("no mask: %v, %v", got, err)
	}
	// A map is replaced as a whole, and a mask can empty it. HTTP clients have name
	// and etag in theirs.
	got, err = update(&cloudcodev1.Session{Etag: got.GetEtag()}, "name", "etag", "labels")
	if err != nil || len(got.GetLabels()) != 0 {
		t.Errorf("emptied: %v, %v", got, err)
	}
	same, err := update(&cloudcodev1.Session{}, "labels")
	if err != nil || same.GetEtag() != got.GetEtag() {
		t.Errorf("nothing changed, but the etag did: %v", err)
	}
	got, err = update(&cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{DiskBytes: 3 << 30}}}, "*")
	if err != nil || len(got.GetSpec().GetEnv()) != 0 || got.GetSpec().GetImage() != "default:1" {
		t.Errorf("everything: %v, %v", got, err)
	}

	for name, c := range map[string]struct {
		sess *cloudcodev1.Session
		mask []string
		says string
	}{
		"unknown path":   {&cloudcodev1.Session{}, []string{"spec.colour"}, "spec.colour"},
		"derived":        {&cloudcodev1.Session{}, []string{"state"}, "derived"},
		"nested derived": {&cloudcodev1.Session{}, []string{"progress.phase"}, "derived"},
		"star and more":  {&cloudcodev1.Session{}, []string{"*", "labels"}, "alone"},
		"shrink":         {&cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{DiskBytes: 1 << 30}}}, []string{"spec.resources.disk_bytes"}, "shrink"},
		"no limit":       {&cloudcodev1.Session{}, []string{"spec.resources"}, "taken away"},
		"bad label":      {&cloudcodev1.Session{Labels: map[string]string{"a b": ""}}, []string{"labels"}, "key"},
		"bad image":      {&cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Image: "A B"}}, nil, "image"},
	} {
		_, err := update(c.sess, c.mask...)
		wantErr(t, name, err, codes.InvalidArgument, "INVALID_FIELDS")
		if !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%s: %v does not say %q", name, err, c.says)
		}
	}
	_, err = update(&cloudcodev1.Session{Etag: made.GetEtag(), Labels: map[string]string{"x": "y"}})
	wantErr(t, "old etag", err, codes.Aborted, "ETAG_MISMATCH")
	_, err = f.UpdateSession(t.Context(), &cloudcodev1.UpdateSessionRequest{Session: &cloudcodev1.Session{Name: "sessions/zz"}})
	wantErr(t, "unknown", err, codes.NotFound, "SESSION_NOT_FOUND")
	if _, err := f.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/a"}); err != nil {
		t.Fatal(err)
	}
	_, err = update(&cloudcodev1.Session{Labels: map[string]string{"x": "y"}})
	wantErr(t, "deleting", err, codes.FailedPrecondition, "SESSION_DELETING")
}

func TestMaskKnowsEveryField(t *testing.T) {
	// A field that is added to the spec must get a path.
	full := &cloudcodev1.SessionSpec{}
	fieldsOf := full.ProtoReflect().Descriptor().Fields()
	for i := range fieldsOf.Len() {
		var v violations
		if maskFields(&v, &fieldmaskpb.FieldMask{Paths: []string{"spec." + string(fieldsOf.Get(i).Name())}}, nil); len(v) > 0 {
			t.Errorf("%v", v)
		}
	}
}

func TestDelete(t *testing.T) {
	f := newFixture(t, nil)
	made := f.create(t, "a", nil)
	f.edit(t, "a", place)
	_, err := f.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/a", Etag: made.GetEtag()})
	wantErr(t, "old etag", err, codes.Aborted, "ETAG_MISMATCH")
	for range 2 {
		got, err := f.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/a"})
		if err != nil || got.GetState() != cloudcodev1.Session_DELETING || got.GetNode() != "nodes/n1" {
			t.Errorf("delete: %v, %v", got, err)
		}
	}
	_, err = f.CreateSession(t.Context(), &cloudcodev1.CreateSessionRequest{SessionId: "a"})
	wantErr(t, "create meanwhile", err, codes.AlreadyExists, "SESSION_EXISTS")
	_, err = f.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/b"})
	wantErr(t, "unknown", err, codes.NotFound, "SESSION_NOT_FOUND")
	if _, err = f.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/b", AllowMissing: true}); err != nil {
		t.Errorf("allow_missing: %v", err)
	}
	var states []fleet.State
	_ = f.store.View(t.Context(), func(tx store.ReadTx) error {
		for e := range tx.Events(made.GetUid(), 0) {
			states = append(states, e.Session.State)
		}
		return nil
	})
	if !slices.Equal(states, []fleet.State{fleet.StatePending, fleet.StateDeleting}) {
		t.Errorf("events %v", states)
	}
}

func TestNodes(t *testing.T) {
	f := newFixture(t, nil)
	if _, err := f.store.Update(t.Context(), func(tx store.Tx) error {
		for _, id := range []string{"n1", "n2", "n3"} {
			if err := tx.PutNode(&fleet.Node{ID: id, State: fleet.NodeReady}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	f.create(t, "a", nil)
	f.edit(t, "a", place)
	got, err := f.nodes.GetNode(t.Context(), &cloudcodev1.GetNodeRequest{Name: "nodes/n1"})
	if err != nil || got.GetSessionCount() != 1 || got.GetState() != cloudcodev1.Node_READY {
		t.Errorf("%v, %v", got, err)
	}
	_, err = f.nodes.GetNode(t.Context(), &cloudcodev1.GetNodeRequest{Name: "nodes/n9"})
	wantErr(t, "unknown", err, codes.NotFound, "NODE_NOT_FOUND")
	first, err := f.nodes.ListNodes(t.Context(), &cloudcodev1.ListNodesRequest{PageSize: 2})
	if err != nil || len(first.GetNodes()) != 2 || first.GetNextPageToken() == "" {
		t.Fatalf("%v, %v", first, err)
	}
	second, err := f.nodes.ListNodes(t.Context(), &cloudcodev1.ListNodesRequest{PageSize: 2, PageToken: first.GetNextPageToken()})
	if err != nil || len(second.GetNodes()) != 1 || second.GetNodes()[0].GetName() != "nodes/n3" || second.GetNextPageToken() != "" {
		t.Errorf("%v, %v", second, err)
	}
	_, err = f.ListSessions(t.Context(), &cloudcodev1.ListSessionsRequest{PageToken: first.GetNextPageToken()})
	wantErr(t, "token of another list", err, codes.InvalidArgument, "INVALID_FIELDS")
}
