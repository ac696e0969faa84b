package containerd

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

func (e *env) spec(session string, args ...string) runtime.Spec {
	return runtime.Spec{
		Session: session, Generation: 1, Image: "localhost/cloudcode/test:latest", Args: args,
		IDBase: 0x10000000, LogDir: filepath.Join(e.dir, "logs", session),
	}
}

func (e *env) get(ctx context.Context, session, url string) (string, error) {
	c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return e.Dial(ctx, session, 8080)
	}}}
	for {
		res, err := c.Get("http://session" + url)
		if err == nil {
			defer res.Body.Close()
			b, err := io.ReadAll(res.Body)
			if res.StatusCode != 200 {
				return "", fmt.Errorf("%s: %s", res.Status, b)
			}
			return string(b), err
		}
		select {
		case <-ctx.Done():
			return "", err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func TestThin(t *testing.T) {
	e := newEnv(t)
	ctx := testContext(t)
	e.importImage(t, "localhost/cloudcode/test:latest")
	start := time.Now()
	inst, err := e.Ensure(ctx, e.spec("one"), func(p runtime.Progress) { t.Log(p) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("ensure %v %+v", time.Since(start), inst)
	out, err := e.get(ctx, "one", "/addrs")
	t.Log(out, err)
	for _, u := range []string{"/read?path=/proc/self/status", "/read?path=/etc/hosts", "/read?path=/proc/self/mountinfo", "/listen?addr=:80", "/read?path=/proc/self/cgroup", "/stat?path=/", "/stat?path=/etc/variant", "/write?path=/x&data=y", "/stat?path=/x", "/setns", "/env?name=HOSTNAME"} {
		out, err := e.get(ctx, "one", u)
		t.Log(u, out, err)
	}
	start = time.Now()
	for range 100 {
		c, err := e.Dial(ctx, "one", 8080)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	t.Logf("dial %v", time.Since(start)/100)
	for i := range 3 {
		start = time.Now()
		inst, err = e.Ensure(ctx, e.spec(fmt.Sprint("two", i)), nil)
		t.Log("ensure", time.Since(start), err)
	}
	list, err := e.List(ctx)
	t.Log(len(list), err)
	for i := range 3 {
		start = time.Now()
		err = e.Stop(ctx, fmt.Sprint("two", i), time.Second)
		t.Log("stop", time.Since(start), err)
	}
}
