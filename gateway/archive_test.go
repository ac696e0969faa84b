package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
)

type (
	archiveOut = grpc.ServerStreamingServer[cloudcodev1.ReadArchiveResponse]
	archiveIn  = grpc.ClientStreamingServer[cloudcodev1.WriteArchiveRequest, cloudcodev1.WriteArchiveResponse]
)

func TestReadArchive(t *testing.T) {
	r := start(t, Config{})
	content := bytes.Repeat([]byte("0123456789abcdef"), 100<<10)
	var got *cloudcodev1.ReadArchiveRequest
	r.server.read = func(req *cloudcodev1.ReadArchiveRequest, s archiveOut) error {
		got = req
		_ = s.Send(&cloudcodev1.ReadArchiveResponse{EstimatedBytes: int64(len(content))})
		for rest := content; len(rest) > 0; {
			n := min(len(rest), 300_001)
			if err := s.Send(&cloudcodev1.ReadArchiveResponse{Data: rest[:n]}); err != nil {
				return err
			}
			rest = rest[n:]
		}
		return nil
	}
	a := r.get(r.url("", "/v1/sessions/main/archive?path=src/a%20b&checkpoint=20261124"))
	if a.code != 200 || a.body != string(content) || a.h.Get("Content-Type") != "application/x-tar" || a.h.Get("Content-Disposition") != `attachment; filename="main-a b.tar"` {
		t.Errorf("%d %v, %d bytes", a.code, a.h, len(a.body))
	}
	if got.GetName() != "sessions/main" || got.GetPath() != "src/a b" || got.GetCheckpoint() != "20261124" {
		t.Errorf("the server was asked %v", got)
	}
	a = r.get(r.url("", "/v1/sessions/main/archive?path="))
	if a.h.Get("Content-Disposition") != "attachment; filename=main.tar" {
		t.Errorf("%v", a.h)
	}

	// Nothing at all is an answer, too.
	r.server.read = func(*cloudcodev1.ReadArchiveRequest, archiveOut) error { return nil }
	if a := r.get(r.url("", "/v1/sessions/main/archive")); a.code != 200 || a.body != "" {
		t.Errorf("%d %q", a.code, a.body)
	}
	// Errors before the first byte are told as such, also behind an estimate.
	for _, c := range []struct {
		code codes.Code
		http int
	}{{codes.NotFound, 404}, {codes.FailedPrecondition, 400}, {codes.Unavailable, 503}} {
		r.server.read = func(_ *cloudcodev1.ReadArchiveRequest, s archiveOut) error {
			_ = s.Send(&cloudcodev1.ReadArchiveResponse{EstimatedBytes: 7})
			return grpcerr.New(c.code, "SOME_REASON", "no")
		}
		if a := r.get(r.url("", "/v1/sessions/main/archive")); a.code != c.http || !strings.Contains(a.body, "SOME_REASON") || a.h.Get("Content-Disposition") != "" {
			t.Errorf("%v: %d %s", c.code, a.code, a.body)
		}
	}
	// After that the connection breaks.
	r.server.read = func(_ *cloudcodev1.ReadArchiveRequest, s archiveOut) error {
		_ = s.Send(&cloudcodev1.ReadArchiveResponse{Data: []byte("part")})
		return grpcerr.New(codes.Unavailable, "NODE_UNREACHABLE", "the node has gone")
	}
	_, body := r.stream(r.url("", "/v1/sessions/main/archive"))
	if rest, err := io.ReadAll(body); err == nil {
		t.Errorf("an archive that breaks off looks whole: %q", rest)
	}
}

// A client that does not read stops its node from sending, and is not waited for
// for ever; one that goes away is noticed.
func TestReadArchiveBackPressure(t *testing.T) {
	r := start(t, Config{WriteTimeout: 300 * time.Millisecond})
	var sent atomic.Int64
	ended := make(chan error, 1)
	const total = 256 << 20
	r.server.read = func(_ *cloudcodev1.ReadArchiveRequest, s archiveOut) error {
		chunk := make([]byte, 64<<10)
		for sent.Load() < total {
			if err := s.Send(&cloudcodev1.ReadArchiveResponse{Data: chunk}); err != nil {
				ended <- err
				return err
			}
			sent.Add(int64(len(chunk)))
		}
		ended <- nil
		return nil
	}
	conn, err := net.Dial("tcp", r.gw.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /v1/sessions/main/archive HTTP/1.1\r\nHost: localhost\r\n\r\n")
	select {
	case err := <-ended:
		if err == nil {
			t.Error("all was sent to somebody who reads nothing")
		}
	case <-time.After(bound):
		t.Fatal("a client that does not read holds the archive for ever")
	}
	if n := sent.Load(); n > total/4 {
		t.Errorf("%d bytes were taken for a client that reads nothing", n)
	}
}

func TestWriteArchive(t *testing.T) {
	r := start(t, Config{})
	type upload struct {
		first *cloudcodev1.WriteArchiveRequest
		data  bytes.Buffer
		err   error
	}
	uploads := make(chan *upload, 1)
	r.server.write = func(s archiveIn) error {
		u := &upload{}
		defer func() { uploads <- u }()
		if u.first, u.err = s.Recv(); u.err != nil {
			return u.err
		}
		for {
			req, err := s.Recv()
			if errors.Is(err, io.EOF) {
				return s.SendAndClose(&cloudcodev1.WriteArchiveResponse{Files: 3, Bytes: int64(u.data.Len())})
			}
			if err != nil {
				u.err = err
				return err
			}
			if req.GetName() != "" || req.GetPath() != "" {
				u.err = errors.New("named again")
			}
			u.data.Write(req.GetData())
		}
	}
	content := strings.Repeat("0123456789abcdef", 500<<10) // beyond what other requests may have
	url := r.url("", "/v1/sessions/main/archive?path=src")
	for what, body := range map[string]io.Reader{"of a known length": strings.NewReader(content), "in chunks": io.MultiReader(strings.NewReader(content))} {
		a := r.do(http.MethodPut, url, body, "Content-Type", "application/x-tar")
		u := <-uploads
		if a.code != 200 || a.body != fmt.Sprintf("{\"files\":\"3\",\"bytes\":\"%d\"}\n", len(content)) || !strings.HasPrefix(a.h.Get("Content-Type"), "application/json") {
			t.Errorf("%s: %d %s", what, a.code, a.body)
		}
		if u.err != nil || u.first.GetName() != "sessions/main" || u.first.GetPath() != "src" || u.data.String() != content {
			t.Errorf("%s: %v, %v, %d bytes", what, u.err, u.first, u.data.Len())
		}
	}

	// An upload that breaks off is not taken for all.
	for what, head := range map[string]string{"length": "Content-Length: 100000\r\n\r\nonly this", "chunks": "Transfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n"} {
		conn, err := net.Dial("tcp", r.gw.Addr())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(conn, "PUT /v1/sessions/main/archive HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-tar\r\n"+head)
		conn.Close()
		if u := <-uploads; u.err == nil {
			t.Errorf("%s: an upload that broke off was taken for all: %q", what, u.data.String())
		}
	}

	// What the server says comes through, also while more is sent.
	r.server.write = func(archiveIn) error {
		return grpcerr.New(codes.FailedPrecondition, "SESSION_NOT_RUNNING", "it does not run")
	}
	if a := r.do(http.MethodPut, url, strings.NewReader("x"), "Content-Type", "application/x-tar"); a.code != 400 || !strings.Contains(a.body, "SESSION_NOT_RUNNING") {
		t.Errorf("%d %s", a.code, a.body)
	}
	r.server.write = func(archiveIn) error { t.Error("the server was asked"); return nil }
	for _, kind := range []string{"", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"} {
		if a := r.do(http.MethodPut, url, strings.NewReader("x"), "Content-Type", kind); a.code != 415 {
			t.Errorf("%q: %d %s", kind, a.code, a.body)
		}
	}
	// Pages of others must not: neither of other sites nor of a session.
	for _, h := range [][]string{
		{"Origin", "http://evil.example"}, {"Origin", r.url("main.localhost", "")}, {"Origin", "null"}, {"Sec-Fetch-Site", "cross-site"},
	} {
		if a := r.do(http.MethodPut, url, strings.NewReader("x"), append(h, "Content-Type", "application/x-tar")...); a.code != 403 || !strings.Contains(a.body, "ORIGIN_NOT_ALLOWED") {
			t.Errorf("%v: %d %s", h, a.code, a.body)
		}
	}
	if a := r.do(http.MethodPost, url, strings.NewReader("x"), "Content-Type", "application/x-tar"); a.code != 405 && a.code != 404 {
		t.Errorf("POST: %d %s", a.code, a.body)
	}
}

// An upload that stalls does not hold a session's node for ever.
func TestWriteArchiveStalls(t *testing.T) {
	r := start(t, Config{WriteTimeout: 100 * time.Millisecond})
	ended := make(chan error, 1)
	r.server.write = func(s archiveIn) error {
		for {
			if _, err := s.Recv(); err != nil {
				ended <- err
				return err
			}
		}
	}
	conn, err := net.Dial("tcp", r.gw.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "PUT /v1/sessions/main/archive HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-tar\r\nContent-Length: 10\r\n\r\nhalf")
	select {
	case err := <-ended:
		if errors.Is(err, io.EOF) {
			t.Error("what came was taken for all")
		}
	case <-time.After(bound):
		t.Fatal("a stalled upload is waited for for ever")
	}
}

func TestArchiveNeedsPassword(t *testing.T) {
	r := start(t, Config{Username: "ann", Password: "pw"})
	r.server.read = func(*cloudcodev1.ReadArchiveRequest, archiveOut) error { t.Error("asked"); return nil }
	r.server.write = func(archiveIn) error { t.Error("asked"); return nil }
	for _, method := range []string{http.MethodGet, http.MethodPut} {
		if a := r.do(method, r.url("", "/v1/sessions/main/archive?auth_token=eA=="), strings.NewReader(""), "Content-Type", "application/x-tar"); a.code != 401 {
			t.Errorf("%s: %d", method, a.code)
		}
	}
}

// What takes long is given time; the rest is not.
func TestTimeouts(t *testing.T) {
	for path, want := range map[string]time.Duration{
		"/v1/sessions": unaryTimeout, "/v1/sessions/main": unaryTimeout, "/v1/sessions/main/checkpoints": unaryTimeout,
		"/v1/sessions/main:suspend": unaryTimeout, "/v1/sessions/checkpoint": savingTimeout, "/v1/sessions/main:checkpoint": savingTimeout,
		"/v1/sessions/main:fork": savingTimeout, "/v1/sessions/main:restore": savingTimeout, "/v1/storageProfiles": unaryTimeout,
		"/v1/storageProfiles/default/sessions": savingTimeout, "/v1/storageProfiles/default/sessions:recover": savingTimeout,
	} {
		if have := timeoutOf(path); have != want {
			t.Errorf("%s: %s, want %s", path, have, want)
		}
	}
}

func TestStorageAPI(t *testing.T) {
	r := start(t, Config{})
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	r.server.checkpoints = func() []*cloudcodev1.Checkpoint { return []*cloudcodev1.Checkpoint{{Id: "c1", Trigger: "turn"}} }
	for _, c := range []struct{ method, path, body, want string }{
		{"POST", "/v1/sessions/main:suspend", "{}", `"name":"sessions/main"`},
		{"POST", "/v1/sessions/main:resume", "{}", `"name":"sessions/main"`},
		{"POST", "/v1/sessions/main:checkpoint", "{}", `"id":"c1"`},
		{"POST", "/v1/sessions/main:restore", `{"checkpoint":"c1"}`, `"name":"sessions/main"`},
		{"POST", "/v1/sessions/main:fork", `{"checkpoint":"c1","sessionId":"x"}`, `"name":"sessions/main"`},
		{"GET", "/v1/sessions/main/checkpoints", "", `"trigger":"turn"`},
		{"GET", "/v1/storageProfiles", "", `"bucket":"work"`},
		{"DELETE", "/v1/sessions/main?purgeStorage=true", "", `"name":"sessions/main"`},
	} {
		if a := r.do(c.method, r.url("", c.path), strings.NewReader(c.body)); a.code != 200 || !strings.Contains(a.body, c.want) {
			t.Errorf("%s %s: %d %s", c.method, c.path, a.code, a.body)
		}
	}
	want := "suspend sessions/main, resume sessions/main, checkpoint sessions/main, restore c1 sessions/main, fork x at c1 from sessions/main, delete purge=true sessions/main"
	if have := strings.Join(r.server.calls(), ", "); have != want {
		t.Errorf("the server was told %s", have)
	}
}

func TestCheckpointedEvent(t *testing.T) {
	r := start(t, Config{})
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	r.server.events = func(_ string, s eventStream) error {
		_ = s.Send(&cloudcodev1.SessionEvent{Id: "3-1", Event: &cloudcodev1.SessionEvent_Checkpointed{
			Checkpointed: &cloudcodev1.CheckpointedEvent{Checkpoint: &cloudcodev1.Checkpoint{Id: "c1", Files: 2}},
		}})
		return s.Send(&cloudcodev1.SessionEvent{Event: &cloudcodev1.SessionEvent_End{End: &cloudcodev1.EndEvent{Reason: "DELETED"}}})
	}
	a := r.get(r.url("", "/v1/sessions/main/events"))
	if !strings.Contains(a.body, "id: 3-1\nevent: checkpointed\ndata: {\"checkpoint\":{\"id\":\"c1\",") {
		t.Errorf("%q", a.body)
	}
}

func TestSuspendedSession(t *testing.T) {
	r := start(t, Config{})
	r.put(session("main", cloudcodev1.Session_SUSPENDED, 1))
	a := r.get(r.url("main.localhost", "/session"))
	if a.code != 503 || a.h.Get("Retry-After") != "" || !strings.Contains(a.body, "SESSION_SUSPENDED") || !strings.Contains(a.body, "cloudcode session resume main") {
		t.Errorf("%d %v %s", a.code, a.h, a.body)
	}
	a = r.get(r.url("main.localhost", "/"), "Accept", "text/html")
	if a.code != 503 || strings.Contains(a.body, "http-equiv") || !strings.Contains(a.body, "main is suspended") ||
		!strings.Contains(a.body, "cloudcode session resume main") || !strings.Contains(a.body, `href="`+r.gw.BaseURI()+`/cloudcode/#/sessions/main"`) {
		t.Errorf("%d %s", a.code, a.body)
	}
	saving := session("main", cloudcodev1.Session_SUSPENDING, 1)
	saving.Session.Progress = &cloudcodev1.StartProgress{Phase: "checkpoint", Detail: "saving 3 files", CurrentBytes: 1, TotalBytes: 2}
	r.put(saving)
	a = r.get(r.url("main.localhost", "/session"))
	if a.code != 503 || a.h.Get("Retry-After") == "" || !strings.Contains(a.body, `"state":"SUSPENDING"`) {
		t.Errorf("%d %v %s", a.code, a.h, a.body)
	}
	a = r.get(r.url("main.localhost", "/"), "Accept", "text/html")
	if a.code != 503 || !strings.Contains(a.body, "http-equiv") || !strings.Contains(a.body, "main is being suspended") || !strings.Contains(a.body, "saving 3 files") {
		t.Errorf("%d %s", a.code, a.body)
	}

	// Whoever waits for a session that is resumed gets through.
	r.put(session("main", cloudcodev1.Session_STARTING, 2))
	r.backend("main", 2, openCodePort, echo)
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	answered := make(chan int, 1)
	go func() {
		defer close(answered)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url("main.localhost", "/x"), nil)
		if err != nil {
			return
		}
		if resp, err := r.client.Do(req); err == nil {
			resp.Body.Close()
			answered <- resp.StatusCode
		}
	}()
	r.linkNode()
	r.put(session("main", cloudcodev1.Session_RUNNING, 2))
	if code := <-answered; code != 200 {
		t.Errorf("answered %d", code)
	}
}
