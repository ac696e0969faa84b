// Command helper is the only program in the test image. Each word does one
// thing that a test needs of a container.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		fail("usage: helper WORD [ARGUMENT…]")
	}
	args := append(os.Args[2:], "", "")
	switch os.Args[1] {
	case "serve": // HTTP on loopback until SIGTERM
		term := make(chan os.Signal, 1)
		signal.Notify(term, syscall.SIGTERM)
		go serve("127.0.0.1:" + args[0])
		<-term
	case "serve6":
		serve("[::1]:" + args[0])
	case "stubborn": // as serve, but SIGTERM is ignored
		signal.Ignore(syscall.SIGTERM)
		serve("127.0.0.1:" + args[0])
	case "exit":
		code, err := strconv.Atoi(args[0])
		check(err)
		os.Exit(code)
	case "print": // N lines on each stream
		n, err := strconv.Atoi(args[0])
		check(err)
		for i := range n {
			fmt.Printf("out %d\n", i)
			fmt.Fprintf(os.Stderr, "err %d\n", i)
		}
	case "oom":
		var keep [][]byte
		for {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = byte(i)
			}
			keep = append(keep, b)
			_ = keep
		}
	case "oom-child": // the child is killed, this goes on
		cmd := exec.Command("/proc/self/exe", "oom")
		err := cmd.Run()
		fmt.Println("child:", err)
		os.Exit(3)
	case "fork": // start N sleeping children, say how many there are
		n, err := strconv.Atoi(args[0])
		check(err)
		ok := 0
		for range n {
			if exec.Command("/proc/self/exe", "sleep").Start() == nil {
				ok++
			}
		}
		fmt.Println("children:", ok)
	case "sleep":
		time.Sleep(time.Hour)
	default:
		fail("unknown word " + os.Args[1])
	}
}

// serve answers / with the generation-free facts a test may look at:
// /file?read=PATH, /write?path=PATH&data=TEXT, /env?name=N, /status (this
// process's /proc/self/status), /listen80, /dial?addr=HOST:PORT, /connect.
func serve(addr string) {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("/read", func(w http.ResponseWriter, r *http.Request) {
		data, err := os.ReadFile(r.FormValue("path"))
		answer(w, string(data), err)
	})
	mux.HandleFunc("/write", func(w http.ResponseWriter, r *http.Request) {
		answer(w, "", os.WriteFile(r.FormValue("path"), []byte(r.FormValue("data")), 0o644))
	})
	mux.HandleFunc("/fill", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.FormValue("bytes"))
		if err == nil {
			err = os.WriteFile(r.FormValue("path"), make([]byte, n), 0o644)
		}
		answer(w, "", err)
	})
	mux.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) {
		answer(w, os.Getenv(r.FormValue("name")), nil)
	})
	mux.HandleFunc("/stat", func(w http.ResponseWriter, r *http.Request) {
		var st syscall.Stat_t
		err := syscall.Lstat(r.FormValue("path"), &st)
		answer(w, fmt.Sprintf("%d %d %o", st.Uid, st.Gid, st.Mode), err)
	})
	mux.HandleFunc("/listen", func(w http.ResponseWriter, r *http.Request) {
		l, err := net.Listen("tcp", r.FormValue("addr"))
		if err == nil {
			err = l.Close()
		}
		answer(w, "", err)
	})
	mux.HandleFunc("/dial", func(w http.ResponseWriter, r *http.Request) {
		c, err := net.DialTimeout("tcp", r.FormValue("addr"), 2*time.Second)
		if err == nil {
			err = c.Close()
		}
		answer(w, "", err)
	})
	mux.HandleFunc("/addrs", func(w http.ResponseWriter, _ *http.Request) {
		addrs, err := net.InterfaceAddrs()
		var out []string
		for _, a := range addrs {
			out = append(out, a.String())
		}
		answer(w, strings.Join(out, "\n"), err)
	})
	mux.HandleFunc("/setns", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, "", syscall.Unshare(syscall.CLONE_NEWUSER))
	})
	check(http.ListenAndServe(addr, mux))
}

func answer(w http.ResponseWriter, text string, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprint(w, text)
}

func check(err error) {
	if err != nil {
		fail(err.Error())
	}
}

func fail(msg string) {
	fmt.Fprintln(os.Stderr, msg)
	os.Exit(2)
}
